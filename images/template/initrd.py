"""The initrd for one plan: the template's programs, the client's modules, the settings.

`template`  our own init alone. Of the default kernel's modules none is left: a module of another release would not load
            anyway, and what is not there cannot bind to the wrong device.
`append`    the client's own initrd and a segment of ours behind it (append.py), for roots that our init does not know.

The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from appliance.errors import GuestUnreadable, ImageError
from images.model import Layer, Plan
from images.template.append import segment
from images.template.build import Template
from images.template.compress import compress
from images.template.modules import plain, plain_name, vermagic
from images.template.newc import Archive
from images.template.settings import Settings, conf, nics
from images.template.userland import files_for

__all__ = ["make_initrd"]

_PROGRAMS = 0o755


def make_initrd(
    template: Template,
    plan: Plan,
    modules: Mapping[str, bytes],
    settings: Settings,
    *,
    zstd: bool = True,
    firmware: Mapping[str, bytes] | None = None,
    client_initrd: bytes = b"",
) -> bytes:
    """The packed initrd.

    `modules`: content of each path of `plan.load`, as it is on the client's disk. `firmware`: files by path relative to
    /lib/firmware. `client_initrd` is needed for `append`. Raises ImageError when a
    module is not given or one is given that the plan does not load, GuestUnreadable when one is damaged or of another
    kernel release.
    """
    if set(modules) != set(plan.load):
        wrong = sorted(set(modules) ^ set(plan.load))
        raise ImageError(reason=f"the modules given are not those of the plan: {', '.join(wrong)}")
    plains = {path: _checked(plan, path, data) for path, data in modules.items()}
    if plan.mode == "append":
        if not client_initrd:
            raise GuestUnreadable(what=f"initrd of {plan.client.host!r}", reason="it is empty")
        busybox = template.userland / "bin/busybox"
        ours = compress(segment(busybox, plan, plains, settings, firmware or {}), zstd=zstd)
        # A segment begins on a multiple of four bytes; zeros between two are skipped.
        return client_initrd + bytes(-len(client_initrd) % 4) + ours
    return compress(_archive(template, plan, plains, settings, firmware or {}), zstd=zstd)


def _archive(
    template: Template, plan: Plan, plains: Mapping[str, bytes], settings: Settings, firmware: Mapping[str, bytes]
) -> bytes:
    archive = Archive()
    for name, data in files_for(template.userland, _tools(plan, settings)).items():
        archive.file(name, data, _PROGRAMS)
    archive.link("bin/sh", "busybox")  # the interpreter of init; it makes the other links itself
    for folder in ("dev", "proc", "sys", "run", "root", "tmp", "etc"):
        archive.folder(folder)
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, 0o666)
    for path, data in plains.items():
        # Unpacked: busybox cannot read every form, and all of it is packed again as a whole.
        archive.file(f"lib/modules/{plan.client.release}/{plain_name(path)}", data)
    for name, data in firmware.items():
        archive.file(f"lib/firmware/{name}", data)
    archive.file("rw/modules", "".join(f"{plain_name(path)}\n" for path in plan.load).encode())
    archive.file("rw/conf", conf(plan, settings))
    if plan.rename:
        archive.file("rw/nics", nics(plan))
    for name, data in settings.run.items():
        archive.file(f"rw/root/{name}", data)
    for name, data in settings.extra.items():
        archive.file(name, data, _PROGRAMS)
    return archive.finish()


def _tools(plan: Plan, settings: Settings) -> set[str]:
    """Only what this root needs: all of them with their libraries would make the image three times as large."""
    needed = {"blkid", *settings.tools}
    layers = plan.client.root.layers
    needed |= {"mdadm"} if Layer.MD in layers else set()
    needed |= {"cryptsetup", "dmsetup"} if Layer.LUKS in layers else set()
    needed |= {"lvm", "dmsetup"} if Layer.LVM in layers else set()
    return needed


def _checked(plan: Plan, path: str, data: bytes) -> bytes:
    module = plain(path, data)
    built_for = vermagic(module)
    if built_for != plan.client.release:
        reason = f"it is for kernel {built_for or '(it does not say)'} and not for {plan.client.release}"
        raise GuestUnreadable(what=f"module {path!r}", reason=reason)
    return module
