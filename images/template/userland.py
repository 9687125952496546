"""The programs of our own initrd, out of Debian's packages.

    bin/busybox         static: nothing has to be found before it runs
    init                `init.sh` beside this file
    rw/bin/TOOL         nbd-client, dmsetup, lvm, cryptsetup, mdadm, blkid
    rw/lib/ld.so, *.so  their loader and libraries: `/rw/lib/ld.so --library-path /rw/lib /rw/bin/TOOL`

The tools have a loader of their own, so that they stay what they are wherever they are called from: beside the client's
initrd, or from /run under the client's own system with another libc. `tools.json` says which libraries each one needs,
so that an image has only the tools that its root needs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from appliance.errors import ImageError
from appliance.process import run

__all__ = ["PACKAGES", "TOOLS", "collect", "files_for"]

TOOLS = ("blkid", "cryptsetup", "dmsetup", "lvm", "mdadm", "nbd-client")
PACKAGES = ("busybox-static", "cryptsetup-bin", "dmsetup", "lvm2", "mdadm", "nbd-client", "util-linux")

_LOADER = "ld-linux-x86-64.so.2"
# Loaded by name when a thread of libcryptsetup ends; no ELF header tells of it.
_LATER = ("libgcc_s.so.1",)
_FOLDERS = ("bin", "sbin", "usr/bin", "usr/sbin")
_LIBRARIES = ("lib", "lib64", "lib/x86_64-linux-gnu", "usr/lib", "usr/lib64", "usr/lib/x86_64-linux-gnu")


def collect(root: Path, into: Path) -> None:
    """Copy the programs and exactly the libraries they need from a root of unpacked packages. Raises ImageError when
    one of them is not there."""
    _copy(_program(root, "busybox"), into / "bin/busybox")
    _copy(Path(__file__).with_name("init.sh"), into / "init")
    libraries: dict[str, Path] = {}
    needs: dict[str, list[str]] = {}
    for name in TOOLS:
        tool = _program(root, name)
        _copy(tool, into / "rw/bin" / name)
        found = _libraries(root, tool)
        needs[name] = sorted(_stored(library) for library in found)
        libraries |= found
    for name, path in sorted(libraries.items()):
        _copy(path, into / "rw/lib" / _stored(name))
    (into / "tools.json").write_text(json.dumps(needs, indent=1, sort_keys=True) + "\n")


def files_for(userland: Path, tools: Iterable[str]) -> dict[str, bytes]:
    """The initrd's programs with these tools: path in the initrd to content. Raises ImageError for a tool that the
    template has not."""
    needs = json.loads((userland / "tools.json").read_text())
    paths = {"bin/busybox", "init"}
    for name in tools:
        if name not in needs:
            raise ImageError(reason=f"the template has no tool {name!r}")
        paths |= {f"rw/bin/{name}", *(f"rw/lib/{library}" for library in needs[name])}
    return {path: (userland / path).read_bytes() for path in sorted(paths)}


def _stored(library: str) -> str:
    return "ld.so" if library == _LOADER else library


def _libraries(root: Path, program: Path) -> dict[str, Path]:
    """File of each library by the name it is asked for, with what libraries need themselves."""
    found: dict[str, Path] = {}
    waiting = [_LOADER, *_needed(program)]
    if program.name == "cryptsetup":
        waiting += _LATER
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _library(root, name)
            waiting += _needed(found[name])
    return found


def _needed(path: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run(["readelf", "--dynamic", "--wide", path]))


def _program(root: Path, name: str) -> Path:
    for folder in _FOLDERS:
        path = root / folder / name
        if path.is_file() and not path.is_symlink():
            return path
    raise ImageError(reason=f"no program {name!r} in packages {', '.join(PACKAGES)}")


def _library(root: Path, name: str) -> Path:
    for folder in _LIBRARIES:
        path = root / folder / name
        if path.is_file():  # absolute links lead out of the unpacked root, and Debian has none between libraries
            return path.resolve()
    raise ImageError(reason=f"no library {name!r} in packages {', '.join(PACKAGES)} and what they depend on")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)
