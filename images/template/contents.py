"""What a build takes out of the client's tree: kernel, initrd, modules, firmware. All of it is a guest's: checked."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from appliance.errors import GuestUnreadable
from appliance.units import MiB
from images.model import Client, Decision, Plan
from images.template.modules import LARGEST, firmware, plain
from images.tree import Tree

__all__ = ["Contents", "StoreReader", "kernel_release", "read_contents"]

_KERNEL = 128 * MiB
_INITRD = 1024 * MiB
_CONFIG = 4 * MiB
_FIRMWARE = 64 * MiB

# Gives the content of a module that the plan takes from the driver store.
StoreReader = Callable[[Decision], bytes]


@dataclass(frozen=True, slots=True)
class Contents:
    """`config` is the text of the kernel's configuration, None where the client has none; `initrd` is empty unless the
    plan appends to it; `modules` and `firmware` by path as for `make_initrd`."""

    kernel: bytes
    config: bytes | None
    initrd: bytes
    modules: Mapping[str, bytes]
    firmware: Mapping[str, bytes]


def read_contents(plan: Plan, tree: Tree, store: StoreReader | None) -> Contents:
    """Raises GuestUnreadable, naming the file."""
    client = plan.client
    kernel = _read(tree, client.kernel, _KERNEL)
    found = kernel_release(kernel)
    if found != client.release:
        what = f"it is {f'kernel {found}' if found else 'no kernel'} and not kernel {client.release}"
        raise GuestUnreadable(what=f"kernel {client.kernel!r} of {client.host!r}", reason=what)
    modules = _modules(plan, tree, store)
    config = str(PurePosixPath(client.kernel).with_name(f"config-{client.release}"))
    return Contents(
        kernel,
        _optional(tree, config, _CONFIG),
        _read(tree, client.initrd, _INITRD) if plan.mode == "append" else b"",
        modules,
        _firmware(client, tree, modules),
    )


def kernel_release(kernel: bytes) -> str:
    """The release of an x86 kernel image; empty when it is none.

    Format: Linux, Documentation/arch/x86/boot.rst: `HdrS` at 0x202, at 0x20E the place less 0x200 of a text that begins
    with the release.
    """
    if len(kernel) < 0x210 or kernel[0x1FE:0x200] != b"\x55\xaa" or kernel[0x202:0x206] != b"HdrS":
        return ""
    place = 0x200 + struct.unpack_from("<H", kernel, 0x20E)[0]
    text = kernel[place : place + 256].partition(b"\0")[0]
    return text.decode(errors="replace").partition(" ")[0]


def _modules(plan: Plan, tree: Tree, store: StoreReader | None) -> dict[str, bytes]:
    decided = {one.path: one for one in plan.decisions if one.path}
    found: dict[str, bytes] = {}
    for path in plan.load:
        decision = decided.get(path)
        if decision is None or decision.origin in ("", "client"):
            found[path] = _read(tree, f"{plan.client.modules}/{path}", LARGEST)
        elif store is None:
            raise GuestUnreadable(what=f"module {path!r}", reason=f"it is in driver store {decision.origin!r} only")
        else:
            found[path] = store(decision)
    return found


def _firmware(client: Client, tree: Tree, modules: Mapping[str, bytes]) -> dict[str, bytes]:
    """What these modules name and the client has; packed files stay packed, as its kernel finds them on its disk."""
    base = str(PurePosixPath(client.modules).parent.parent / "firmware")
    wanted = {name for path, data in modules.items() for name in firmware(plain(path, data)) if _inside(name)}
    found: dict[str, bytes] = {}
    for name in sorted(wanted):
        for form in _forms(name):
            data = _optional(tree, f"{base}/{form}", _FIRMWARE)
            if data is not None:
                found[form] = data
                break
    return found


def _forms(name: str) -> Iterable[str]:
    return (name, f"{name}.xz", f"{name}.zst")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    # A star is a pattern that some drivers give; only the running kernel could tell which of them it wants.
    return not path.is_absolute() and ".." not in path.parts and "*" not in name and str(path) == name


def _read(tree: Tree, path: str, limit: int) -> bytes:
    try:
        return tree.read(path, limit)
    except FileNotFoundError:
        raise GuestUnreadable(what=f"file {path!r}", reason="the point has no such file") from None


def _optional(tree: Tree, path: str, limit: int) -> bytes | None:
    try:
        return tree.read(path, limit)
    except FileNotFoundError:
        return None
