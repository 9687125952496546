"""From the volumes of a point to its Client: which system is on it, and how it starts.

    find root → mount what its fstab names and is needed → os-release, boot entry, kernel, network → Client

The root is the volume that has /etc and a system's os-release; the boot entry's own `root=` must agree. Whatever is
malformed and not needed becomes a warning; what is needed and malformed is GuestUnreadable that names the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from appliance.errors import GuestUnreadable
from images.guest.bootloader import Boot, boot_entry
from images.guest.files import Unsupported
from images.guest.fstab import Names, parse_crypttab, parse_fstab
from images.guest.kernel import LIMIT, is_signed, release_of
from images.guest.layout import ESP
from images.guest.network import interfaces
from images.guest.sealed import containers
from images.guest.texts import fields, lines, printable, text
from images.guest.volumes import Volume
from images.model import Client, Firmware, Generator, Layer, Mount, Root
from images.tree import Tree, exists
from images.words import words_of

__all__ = ["Mountable", "NoSystem", "System", "client_of", "find_system"]

# What the boot of the client and the plan look into. Other file systems stay closed.
_NEEDED = ("/usr", "/boot", "/boot/efi", "/efi", "/etc", "/lib", "/var")
_MUST = ("/usr", "/boot", "/etc", "/lib")
_MARKS = ("/etc/os-release", "/usr/lib/os-release")
_SYSTEMS = 16
# What holds no system, whoever reads it; of LVM the logical volumes count.
_NO_ROOT = ("", "swap", "LVM2_member", "jbd", "vfat")


class NoSystem(GuestUnreadable):
    """There is no Linux, and nothing that another reader could find one in."""


class Mountable(Tree, Protocol):
    """A Tree that is put together of volumes."""

    def mount(self, volume: str, where: str) -> None:
        """Raises GuestUnreadable."""
        ...


@dataclass(frozen=True, slots=True)
class System:
    """A root that was found and mounted. `mounts` maps mount points to volumes."""

    root: Volume
    mounts: Mapping[str, Volume]
    fstab: tuple[Mount, ...]
    warnings: tuple[str, ...]


def find_system(tree: Mountable, volumes: Sequence[Volume]) -> System:
    """Mount the one system that is there. Raises GuestUnreadable when there is none or more than one, or what it needs
    cannot be read; Unsupported when another reader may find it."""
    roots, reasons = [], []
    unknown = any(one.fs not in _NO_ROOT and not one.mountable for one in volumes)
    for volume in [one for one in volumes if one.mountable and one.fs != "vfat"][: 4 * _SYSTEMS]:
        try:
            tree.mount(volume.name, "/")
            if any(exists(tree, mark) for mark in _MARKS) or _has_fstab_with_usr(tree):
                roots.append(volume)
        except GuestUnreadable as error:
            reasons.append(str(error))
            unknown |= isinstance(error, Unsupported)
    roots = _without_seeds(roots)
    if len(roots) != 1:
        kind = GuestUnreadable if roots else Unsupported if unknown else NoSystem
        raise kind(what="the point", reason=_why_no_root(roots, volumes, reasons))
    return _mount_all(tree, roots[0], volumes, reasons)


def _has_fstab_with_usr(tree: Tree) -> bool:
    """A root whose os-release is a link into a /usr that is a file system of its own."""
    return any(line.where == "/usr" for line in parse_fstab(text(tree, "/etc/fstab")))


def _without_seeds(roots: list[Volume]) -> list[Volume]:
    """A btrfs that was mounted from its top shows the same system as its default subvolume."""
    with_flags = [one for one in roots if one.flags]
    return [one for one in roots if one.flags or not any(one.uuid == other.uuid for other in with_flags)]


def _why_no_root(roots: list[Volume], volumes: Sequence[Volume], reasons: list[str]) -> str:
    if roots:
        return f"it has {len(roots)} systems, on {', '.join(one.name for one in roots)}"
    told = ", ".join(f"{one.name} ({printable(one.fs) or 'nothing known'})" for one in volumes[:20])
    return "; ".join([f"no system is on {told or 'its disks'}", *reasons[:3]])


def _mount_all(tree: Mountable, root: Volume, volumes: Sequence[Volume], reasons: list[str]) -> System:
    tree.mount(root.name, "/")
    fstab = parse_fstab(text(tree, "/etc/fstab"))
    names = Names(volumes, parse_crypttab(text(tree, "/etc/crypttab")))
    mounts, warnings = {"/": root}, list(reasons)
    for line in sorted(fstab, key=lambda one: one.where):
        where = line.where.rstrip("/") or "/"
        if where in _NEEDED and line.fs not in ("tmpfs", "none", "nfs", "nfs4", "overlay"):
            volume = _subvolume(names.find(line.spec), line.options, volumes)
            if volume and _mounted(tree, volume, where, warnings):
                mounts[where] = volume
            elif not volume:
                _missing(line, warnings)
    numbered = _numbered(fstab, volumes)
    warnings += [f"/etc/fstab names {printable(spec)} by its number, not by its UUID" for spec in numbered]
    return System(root, mounts, fstab, tuple(warnings))


def _numbered(fstab: tuple[Mount, ...], volumes: Sequence[Volume]) -> list[str]:
    names = Names(volumes)
    for line in fstab:
        names.find(line.spec)
    return names.by_number


def _subvolume(volume: Volume | None, options: tuple[str, ...], volumes: Sequence[Volume]) -> Volume | None:
    """That of a btrfs which a line of fstab means."""
    wanted = next((option.partition("=")[2].strip("/") for option in options if option.startswith("subvol=")), "")
    if volume is None or not wanted:
        return volume
    same = (one for one in volumes if one.uuid == volume.uuid and one.flags == f"subvol={wanted}")
    return next(same, volume)


def _mounted(tree: Mountable, volume: Volume, where: str, warnings: list[str]) -> bool:
    try:
        tree.mount(volume.name, where)
    except GuestUnreadable as error:
        if where in _MUST:
            raise
        warnings.append(f"{where} cannot be read: {error}")
        return False
    return True


def _missing(line: Mount, warnings: list[str]) -> None:
    what = f"{printable(line.where)} on {printable(line.spec)}"
    if line.where in _MUST and "nofail" not in line.options:
        raise GuestUnreadable(what=f"{what}, which the guest's /etc/fstab names", reason="no disk of the point has it")
    warnings.append(f"/etc/fstab names {what}, and no disk of the point has it")


# --- the client ---


def client_of(tree: Tree, system: System, volumes: Sequence[Volume]) -> Client:
    """Raises GuestUnreadable, which names the file."""
    warnings = list(system.warnings)
    about = fields(text(tree, _MARKS[0]) or text(tree, _MARKS[1]))
    boot = boot_entry(tree, {line.where: ",".join(line.options) for line in system.fstab})
    kernel = tree.read(boot.kernel, LIMIT)
    release = _release(kernel, boot.kernel, warnings)
    firmware, shim, grub = _firmware(tree, system, volumes)
    crypttab = parse_crypttab(text(tree, "/etc/crypttab"))
    early = [system.mounts[where] for where in ("/", "/usr") if where in system.mounts]
    return Client(
        host=_host(tree),
        os_id=_os_id(about.get("ID", "")),
        os_name=printable(about.get("PRETTY_NAME", about.get("NAME", "Linux"))),
        release=release,
        kernel=boot.kernel,
        initrd=boot.initrd,
        modules=_modules(tree, release),
        command_line=_command_line(boot),
        root=replace(
            _root(boot, system, Names(volumes, crypttab), warnings), containers=containers(crypttab, early, volumes)
        ),
        generator=_generator(tree),
        firmware=firmware,
        fstab=system.fstab,
        nics=interfaces(tree, warnings),
        crypttab=crypttab,
        usr_layers=early[1].layers if early[1:] else (),
        signed_kernel=is_signed(kernel),
        shim=shim,
        grub=grub,
        warnings=tuple(dict.fromkeys((*warnings, *boot.warnings))),
    )


def _os_id(word: str) -> str:
    """As os-release(5) allows it, which is fit for a folder's name; `linux`, its default, for anything else."""
    return word if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", word) else "linux"


def _host(tree: Tree) -> str:
    name = next(lines(text(tree, "/etc/hostname", 4096)), "")
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}", name) else "localhost"


def _release(kernel: bytes, path: str, warnings: list[str]) -> str:
    """As the kernel itself says; a file's name can be anything."""
    release = release_of(kernel, path)
    named = path.rpartition("/")[2].removeprefix("vmlinuz-")
    if named != release:
        warnings.append(f"kernel {printable(path)} says that it is {release}")
    return release


def _modules(tree: Tree, release: str) -> str:
    path = f"/lib/modules/{release}"
    try:
        found = tree.resolve(path)
        tree.list(found)
    except FileNotFoundError:
        raise GuestUnreadable(what=f"folder {path!r} of the guest", reason="its kernel has no modules there") from None
    return found


def _command_line(boot: Boot) -> str:
    line = boot.command_line
    if any(not letter.isprintable() for letter in line) or len(line) > 2048:
        raise GuestUnreadable(what=f"the command line in {boot.found_in}", reason=f"it is {printable(line)!r}")
    return " ".join(word for word in words_of(line) if not word.startswith(("BOOT_IMAGE=", "initrd=")))


def _root(boot: Boot, system: System, names: Names, warnings: list[str]) -> Root:
    words = dict(word.partition("=")[::2] for word in words_of(boot.command_line))
    in_fstab = next((line for line in system.fstab if line.where == "/"), None)
    spec = words.get("root") or (in_fstab.spec if in_fstab else "")
    volume = system.root
    meant = names.find(spec) if spec else None
    if meant and meant.uuid != volume.uuid:
        reason = f"the boot loader's root is {spec}, on {meant.name}, and a system is on {volume.name}"
        raise GuestUnreadable(what="the point", reason=reason)
    if not meant:
        warnings.append(f"root {printable(spec)!r} is on no disk of the point; {volume.name} is taken")
    warnings += [f"the command line names the root by its number: {printable(one)}" for one in names.by_number]
    plain = set(volume.layers) <= {Layer.PARTITION}
    return Root(
        spec=spec or f"UUID={volume.uuid}", fs=volume.fs, uuid=volume.uuid, disks=volume.disks, layers=volume.layers,
        offset=volume.offset if plain else 0, length=volume.length if plain else 0,
        flags=words.get("rootflags") or volume.flags, volume=volume.name if volume.layers[-1:] == (Layer.LVM,) else "",
    )  # fmt: skip


def _generator(tree: Tree) -> Generator:
    """By the package where that is told: both programs can be there at once."""
    packages = {"initramfs-tools": Generator.INITRAMFS_TOOLS, "dracut": Generator.DRACUT}
    installed = [found for name, found in packages.items() if exists(tree, f"/var/lib/dpkg/info/{name}.list")]
    programs = {"/usr/sbin/mkinitramfs": Generator.INITRAMFS_TOOLS, "/usr/bin/dracut": Generator.DRACUT}
    there = [found for path, found in programs.items() if exists(tree, path)]
    both = [found for found in installed if found in there] or there
    return both[0] if len(set(both)) == 1 else Generator.UNKNOWN


def _firmware(tree: Tree, system: System, volumes: Sequence[Volume]) -> tuple[Firmware, str, str]:
    """(what the disk is set up for, shim, GRUB): UEFI when an ESP with a program is mounted, or is all there is."""
    esp = next((where for where in ("/boot/efi", "/efi", "/boot") if _is_esp(system.mounts.get(where))), "")
    programs = dict(_efi_programs(tree, f"{esp}/EFI")) if esp else {}
    uefi = bool(programs) or (
        any(_is_esp(one) for one in volumes) and not exists(tree, "/boot/grub/i386-pc") and not esp
    )
    shim = programs.get("shimx64.efi", "") or _first(tree, "/usr/lib/shim/shimx64.efi.signed")
    signed = "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
    return Firmware.UEFI if uefi else Firmware.BIOS, shim, programs.get("grubx64.efi", "") or _first(tree, signed)


def _is_esp(volume: Volume | None) -> bool:
    return volume is not None and volume.fs == "vfat" and volume.kind in (ESP, "0xef")


def _efi_programs(tree: Tree, folder: str) -> list[tuple[str, str]]:
    """(name in lower case, path) of the programs two steps below EFI."""
    try:
        below = tree.list(folder)[:64]
        return [
            (name.lower(), f"{folder}/{vendor}/{name}")
            for vendor in below
            for name in tree.list(f"{folder}/{vendor}")[:64]
            if name.lower().endswith(".efi")
        ]
    except FileNotFoundError:
        return []


def _first(tree: Tree, *paths: str) -> str:
    return next((tree.resolve(path) for path in paths if exists(tree, path)), "")
