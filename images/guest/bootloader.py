"""What the client's boot loader would start: kernel, initrd, command line.

    grub.cfg           with its default, submenus, grubenv         (`grub`)
    BLS entries        /boot/loader/entries, by grubenv or the highest version; `$kernelopts` from grubenv
    systemd-boot       loader.conf and entries on the ESP or XBOOTLDR
    nothing of these   the newest /boot/vmlinuz-*, with a warning

Paths in them are relative to the file system they are on, which may be mounted at /boot, /efi or be a subvolume: the
first one that exists counts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from appliance.errors import GuestUnreadable
from images.guest.grub import Entry, choose, expand, parse_grub, parse_grubenv, version_key
from images.guest.texts import fields, lines, listed, printable, text
from images.tree import Kind, Tree, exists
from images.words import words_of

__all__ = ["Boot", "boot_entry"]

_GRUB = ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg")
_LOADERS = ("/boot", "/efi", "/boot/efi")
_MICROCODE = ("ucode", "microcode")
_LEFT_OUT = ("BOOT_IMAGE=", "initrd=")


@dataclass(frozen=True, slots=True)
class Boot:
    """`kernel` and `initrd` with links resolved; `initrd` is empty when there is none."""

    kernel: str
    initrd: str
    command_line: str
    found_in: str
    warnings: tuple[str, ...] = ()


def boot_entry(tree: Tree, mounts: Mapping[str, str]) -> Boot:
    """`mounts` maps mount points to the options of their lines in fstab. Raises GuestUnreadable without a kernel."""
    warnings: list[str] = []
    for find in (_grub, _systemd_boot):
        for entry, where in find(tree):
            boot = _placed(tree, entry, where, mounts, warnings)
            if boot:
                return boot
    return _newest(tree, warnings)


_Finder = Callable[[Tree], Iterator[tuple[Entry, str]]]


# --- the loaders ---


def _grub(tree: Tree) -> Iterator[tuple[Entry, str]]:
    for path in _GRUB:
        content = text(tree, path, 4 << 20)
        if not content:
            continue
        environment = parse_grubenv(text(tree, f"{path.rpartition('/')[0]}/grubenv"))
        menu = parse_grub(content, environment)
        if menu.bls:
            entries = _bls_entries(tree, "/boot/loader/entries", menu.variables)
            chosen = choose(entries, environment.get("saved_entry", "") or menu.default) or next(iter(entries), None)
            if chosen:
                yield chosen, f"/boot/loader/entries/{chosen.id}.conf"
        found = menu.chosen()
        if found and found.kernel:
            yield found, path


def _systemd_boot(tree: Tree) -> Iterator[tuple[Entry, str]]:
    for base in _LOADERS:
        entries = _bls_entries(tree, f"{base}/loader/entries", {})
        wanted = "".join(
            line.partition(" ")[2].strip()
            for line in lines(text(tree, f"{base}/loader/loader.conf").replace("\t", " "))
            if line.startswith("default ")
        )
        matching = [one for one in entries if wanted and fnmatch.fnmatchcase(f"{one.id}.conf", wanted)]
        matching += [one for one in entries if wanted and fnmatch.fnmatchcase(one.id, wanted)]
        for entry in (matching or entries)[:1]:
            yield entry, f"{base}/loader/entries/{entry.id}.conf"


def _bls_entries(tree: Tree, folder: str, variables: Mapping[str, str]) -> list[Entry]:
    """Newest first, as both GRUB and systemd-boot show them."""
    found = [_bls_entry(tree, path, variables) for path in listed(tree, folder, ".conf")]
    return sorted((one for one in found if one.kernel), key=lambda one: version_key(one.id), reverse=True)


def _bls_entry(tree: Tree, path: str, variables: Mapping[str, str]) -> Entry:
    entry = Entry("", path.rpartition("/")[2].removesuffix(".conf"))
    options: list[str] = []
    for line in lines(text(tree, path, 64 << 10).replace("\t", " ")):
        key, _, value = line.partition(" ")
        value = value.strip()
        if key == "title":
            entry.title = value
        elif key == "linux":
            entry.kernel = value
        elif key == "initrd":
            entry.initrds += tuple(expand(value, variables).split())
        elif key == "options":
            options.append(expand(value, variables))
    entry.options = " ".join(words_of(" ".join(options)))
    return entry


def _newest(tree: Tree, warnings: list[str]) -> Boot:
    kernels = sorted(listed(tree, "/boot", ""), key=version_key, reverse=True)
    for path in kernels:
        name = path.rpartition("/")[2]
        if name.startswith("vmlinuz-") and "rescue" not in name:
            release = name.removeprefix("vmlinuz-")
            initrds = [f"/boot/initrd.img-{release}", f"/boot/initramfs-{release}.img", f"/boot/initrd-{release}"]
            initrd = next((one for one in initrds if exists(tree, one)), "")
            options = text(tree, "/etc/kernel/cmdline").strip() or _default_options(tree)
            warnings.append(f"no boot loader's entry is found: the newest kernel is taken, {printable(name)}")
            return Boot(tree.resolve(path), tree.resolve(initrd) if initrd else "", options, "/boot", tuple(warnings))
    raise GuestUnreadable(what="the boot loader of the guest", reason="there is neither an entry nor a kernel in /boot")


def _default_options(tree: Tree) -> str:
    found = fields(text(tree, "/etc/default/grub"))
    return " ".join((found.get("GRUB_CMDLINE_LINUX", ""), found.get("GRUB_CMDLINE_LINUX_DEFAULT", ""))).strip()


# --- where its files are ---


def _placed(tree: Tree, entry: Entry, where: str, mounts: Mapping[str, str], warnings: list[str]) -> Boot | None:
    kernel = _place(tree, entry.kernel, where, mounts)
    if not kernel:
        warnings.append(f"kernel {printable(entry.kernel)!r}, which {where} names, is not there")
        return None
    initrds = [_place(tree, name, where, mounts) for name in entry.initrds]
    for name, path in zip(entry.initrds, initrds, strict=True):
        if not path:
            warnings.append(f"initrd {printable(name)!r}, which {where} names, is not there")
    real = [path for path in initrds if path and not any(mark in path.rpartition("/")[2] for mark in _MICROCODE)]
    words = [word for word in words_of(entry.options) if not word.startswith(_LEFT_OUT)]
    return Boot(kernel, real[-1] if real else "", " ".join(words), where, tuple(warnings))


def _place(tree: Tree, path: str, where: str, mounts: Mapping[str, str]) -> str:
    """The file's path in the whole tree; empty when it is nowhere."""
    path = "/" + path.partition(")")[2].lstrip("/") if path.startswith("(") else path
    if not path.startswith("/"):
        return ""
    bases = [base for base in ("/boot", "/efi", "/boot/efi") if base in mounts]
    # That of the file that names it comes first.
    bases.sort(key=lambda base: (not where.startswith(base + "/"), -len(base)))
    options = [option for line in (mounts.get("/", ""), mounts.get("/boot", "")) for option in line.split(",")]
    volumes = [option.partition("=")[2].strip("/") for option in options if option.startswith("subvol=")]
    cut = [path.removeprefix(f"/{volume}") for volume in volumes if volume and path.startswith(f"/{volume}/")]
    for candidate in (*(base + path for base in bases), path, *cut, "/boot" + path):
        if candidate.startswith("/") and exists(tree, candidate) and tree.kind(tree.resolve(candidate)) is Kind.FILE:
            return tree.resolve(candidate)
    return ""
