"""From a plan to files that firmware starts.

    build_image(plan, tree, template, media=["esp", "iso"], folder=path)

    FOLDER/vmlinuz, initrd, cmdline    what is started, of every medium
    FOLDER/rewind.esp.img, pxe/, ...   the media
    FOLDER/report.json                 `image`: equal for equal builds; `run`: times of this one

What can be refused is refused before anything is written. The folder appears whole or not at all.

No key of an encrypted disk is in an image. Our own init asks for the passphrase; where the client's initrd has to stay
in use and may hold a key, nothing is built. For all else that such an initrd holds only the user who built an image can
read it: files are 0600, and folders 0711, so that whoever starts a machine from a file can hand that one over to the
machine's user (by its owner or an ACL) and it is reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.errors import ImageError, NotSigned, TargetExists
from images.drivers.advice import signed_loaders
from images.drivers.needs import keys_in_initrd
from images.drivers.plan import refuse_if_missing
from images.media.base import Medium, Parts, SignedChain, check_command_line, medium
from images.media.pe import is_signed
from images.model import Firmware, Plan
from images.room import refuse_without
from images.template.build import Template
from images.template.compress import knows_zstd
from images.template.contents import Contents, StoreReader, read_contents
from images.template.initrd import make_initrd
from images.template.settings import Settings, settings_for
from images.tree import Tree

__all__ = ["Built", "build_image"]

# The time that files in an image have (2024-01-01): not that of the build, or no two would be equal.
_EPOCH = 1704067200
# Folder below /EFI where a distribution's GRUB looks for its configuration, where it is not named as in os-release.
_VENDORS = {"rhel": "redhat"}
_SIGNED_PROGRAM = 16 << 20
_FOLDER_MODE, _FILE_MODE = 0o711, 0o600


@dataclass(frozen=True, slots=True)
class Built:
    """A finished build. `files`, `digests` (sha256) and `sizes` (bytes) by medium, and for `vmlinuz` and `initrd`; the
    digest of a folder is that of its sorted list of digests. `modules` as they are loaded. Times in seconds since 1970:
    the template was `template_created`, the build was `requested` and `created`; `seconds` by step."""

    folder: Path
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    modules: tuple[str, ...]
    firmware: tuple[str, ...]
    template: str
    template_created: float
    requested: float
    created: float
    seconds: Mapping[str, float]


def build_image(
    plan: Plan,
    tree: Tree,
    template: Template,
    *,
    media: Sequence[str],
    folder: Path,
    driver_store: StoreReader | None = None,
    settings: Settings | None = None,
) -> Built:
    """Build all `media` of one plan into `folder`, which must not exist. `tree` is the client's.

    Same point, target, template and settings: same digests. Builds in several threads or processes do not meet.
    Its files can be read by this user alone; who starts a machine from them hands them over.
    Raises DriversMissing, NotSigned, TargetExists, GuestUnreadable, ImageError, ToolFailed, NoSpace; nothing is left
    then.
    """
    clock = _Clock()
    chosen = _refuse_first(plan, media, folder)
    with clock.step("read"):
        contents = read_contents(plan, tree, driver_store)
        chain = _signed_chain(plan, tree, template, contents)
    with clock.step("initrd"):
        zstd = knows_zstd(plan.client.release, contents.config)
        initrd = make_initrd(
            template,
            plan,
            contents.modules,
            settings or settings_for(plan),
            zstd=zstd,
            firmware=contents.firmware,
            client_initrd=contents.initrd,
        )
    # Each medium has both in it, and they lie beside them.
    refuse_without((len(contents.kernel) + len(initrd)) * (1 + len(chosen)), folder, "the files of the image")
    with _scratch(folder) as (scratch, made):
        parts = _parts(plan, template, contents, initrd, made, scratch / "work")
        parts = replace(parts, signed=_put_chain(chain, scratch / "work"))
        files = _make(chosen, parts, made, clock)
        built = _describe(folder, made, files, plan, template, contents, clock)
        (made / "report.json").write_text(json.dumps(_report(built, plan), indent=1, sort_keys=True) + "\n")
        _settle(made)
        _give_name(made, folder)
    return built


# --- before anything is written -------------------------------------------------------------------------------------


def _refuse_first(plan: Plan, media: Sequence[str], folder: Path) -> list[Medium]:
    refuse_if_missing(plan)
    if plan.mode == "append" and (keys := keys_in_initrd(plan.client)):
        raise ImageError(
            reason=f"the own initrd of {plan.client.host!r} has to stay in use and may hold the key {keys[0]}, and an"
            " image must not hold one",
            hint="`rewind restore` makes whole disks, which keep their key where it is",
        )
    if folder.exists():
        raise TargetExists(path=folder)
    if not media:
        raise ImageError(reason="no medium is asked for")
    check_command_line(plan.command_line)
    target = plan.inventory
    chosen = [
        medium(name, target.firmware, target=target.name, secure_boot=target.secure_boot)
        for name in dict.fromkeys(media)
    ]
    lost = sorted({tool for one in chosen for tool in one.needs if not shutil.which(tool)})
    if lost:
        raise ImageError(reason=f"tools are not installed: {', '.join(lost)}")
    return chosen


def _signed_chain(plan: Plan, tree: Tree, template: Template, contents: Contents) -> tuple[bytes, bytes, str] | None:
    """Shim and GRUB that lead to the client's kernel, and the vendor's folder; None where nothing is verified. The
    client's own ones: a shim starts only kernels of its own vendor."""
    target, client = plan.inventory, plan.client
    if not target.secure_boot or target.firmware is not Firmware.UEFI:
        return None
    if not client.signed_kernel or not is_signed(contents.kernel):
        raise NotSigned(target=target.name, what=f"kernel {client.release} of {client.host!r}")
    vendor = _VENDORS.get(client.os_id, client.os_id)
    whose = signed_loaders(client)
    if whose == "guest":
        shim, grub = (tree.read(path, _SIGNED_PROGRAM) for path in (client.shim, client.grub))
    elif whose:
        shim, grub = ((template.loaders / name).read_bytes() for name in ("shim.efi", "grub.efi"))
    else:
        raise NotSigned(target=target.name, what=f"a boot loader of {client.os_id!r}, which is not in the point,")
    for name, data in (("shim", shim), ("GRUB", grub)):
        if not is_signed(data):
            raise NotSigned(target=target.name, what=f"{name} of {client.host!r}")
    return shim, grub, vendor


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def _scratch(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A folder beside the later one, which nobody else can enter, and in it the later one under another name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ImageError(reason=f"folder {str(folder)!r} cannot be made: {error.strerror}") from error
    try:
        (scratch / "made").mkdir()
        (scratch / "work").mkdir()
        yield scratch, scratch / "made"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _give_name(made: Path, folder: Path) -> None:
    """Raises TargetExists when somebody else was faster."""
    try:
        os.rename(made, folder)
    except OSError as error:
        if folder.exists():
            raise TargetExists(path=folder) from error
        raise


def _parts(plan: Plan, template: Template, contents: Contents, initrd: bytes, made: Path, work: Path) -> Parts:
    (made / "vmlinuz").write_bytes(contents.kernel)
    (made / "initrd").write_bytes(initrd)
    (made / "cmdline").write_text(plan.command_line + "\n")
    digest = hashlib.sha256(template.id.encode())
    for data in (contents.kernel, initrd, plan.command_line.encode()):
        digest.update(hashlib.sha256(data).digest())
    host = re.sub(r"[^A-Za-z0-9._-]", "?", plan.client.host)
    return Parts(
        title=f"{host} {plan.client.release} on {plan.inventory.name}",
        kernel=made / "vmlinuz",
        initrd=made / "initrd",
        command_line=plan.command_line,
        loaders=template.loaders,
        work=work,
        identity=digest.hexdigest()[:16],
        epoch=_EPOCH,
        console=plan.inventory.console,
    )


def _put_chain(chain: tuple[bytes, bytes, str] | None, work: Path) -> SignedChain | None:
    if chain is None:
        return None
    shim, grub, vendor = chain
    (work / "shim.efi").write_bytes(shim)
    (work / "grub.efi").write_bytes(grub)
    return SignedChain(work / "shim.efi", work / "grub.efi", vendor)


def _make(chosen: Sequence[Medium], parts: Parts, made: Path, clock: _Clock) -> dict[str, Path]:
    files = {"vmlinuz": parts.kernel, "initrd": parts.initrd}
    for one in chosen:
        files[one.name] = made / (f"rewind{one.suffix}" if one.suffix else one.name)
        with clock.step(one.name):
            one.make(parts, files[one.name])
    return files


def _settle(made: Path) -> None:
    """For nobody else, whatever tools and umask made of it, and on the disk before it has its name."""
    for path in (*made.rglob("*"), made):
        path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- the report -----------------------------------------------------------------------------------------------------


def _describe(
    folder: Path,
    made: Path,
    files: Mapping[str, Path],
    plan: Plan,
    template: Template,
    contents: Contents,
    clock: _Clock,
) -> Built:
    return Built(
        folder=folder,
        files={name: folder / path.relative_to(made) for name, path in files.items()},
        digests={name: _digest(path) for name, path in files.items()},
        sizes={name: _size(path) for name, path in files.items()},
        modules=plan.load,
        firmware=tuple(sorted(contents.firmware)),
        template=template.id,
        template_created=template.created,
        requested=clock.begun,
        created=time.time(),
        seconds=dict(clock.seconds),
    )


def _report(built: Built, plan: Plan) -> dict[str, Any]:
    image = {
        "host": plan.client.host,
        "release": plan.client.release,
        "target": plan.inventory.name,
        "mode": plan.mode,
        "command_line": plan.command_line,
        "rename": dict(plan.rename),
        "modules": list(built.modules),
        "firmware": list(built.firmware),
        "template": built.template,
        "warnings": list(plan.warnings),
        "files": {
            name: {"name": path.name, "sha256": built.digests[name], "bytes": built.sizes[name]}
            for name, path in built.files.items()
        },
    }
    run = {
        "template_created": built.template_created,
        "requested": built.requested,
        "created": built.created,
        "seconds": {name: round(spent, 3) for name, spent in built.seconds.items()},
    }
    return {"image": image, "run": run}


def _digest(path: Path) -> str:
    if path.is_dir():
        lines = [f"{_digest(one)}  {one.relative_to(path)}\n" for one in sorted(path.rglob("*")) if one.is_file()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files)


class _Clock:
    """When it began, and the seconds of each step."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
