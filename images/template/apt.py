"""Debian packages, downloaded by this machine's apt and unpacked beside it: nothing is installed.

Not installed because it would change the appliance: mdadm and lvm2 would look for arrays and volumes on its disks, and
some of these disks are guests'. What apt downloads it has verified by the signature of its archive.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ImageError, ToolFailed
from appliance.process import run

__all__ = ["Package", "download", "meant_by", "unpack", "with_libraries"]

# Of a slow mirror, in seconds: a kernel is some 100 MB.
_PATIENCE = 1800.0


@dataclass(frozen=True, slots=True)
class Package:
    """A package that was unpacked: its name, version, and the names that it depends on (first alternatives)."""

    name: str
    version: str
    needs: tuple[str, ...]


def meant_by(metapackage: str) -> str:
    """The kernel package that e.g. `linux-image-amd64` stands for now. Raises ImageError when it names none."""
    shown = _with_lists(lambda: run(["apt-cache", "depends", "--", metapackage], timeout=_PATIENCE))
    found = re.search(r"^\s*Depends: (linux-image-\S+)", shown, re.MULTILINE)
    if not found:
        raise ImageError(reason=f"package {metapackage!r} depends on no kernel package")
    return found[1]


def download(names: Sequence[str], into: Path) -> list[Path]:
    """The .deb files of these packages, in a folder that is made. Raises ImageError with apt's words."""
    into.mkdir(parents=True, exist_ok=True)
    # A folder of root is closed to the user that apt would become. `sh` because apt writes into its working folder.
    inside = ["sh", "-ec", 'cd "$0"; exec "$@"', str(into)]
    command = [*inside, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "--", *names]
    try:
        _with_lists(lambda: run(command, timeout=_PATIENCE))
    except ToolFailed as error:
        reason = f"packages {', '.join(names)} cannot be downloaded: {error.fields.get('reason', error)}"
        raise ImageError(reason=reason, hint="see whether `apt-get update` works on this machine") from error
    return sorted(into.glob("*.deb"))


def unpack(archive: Path, into: Path) -> Package:
    """Unpack one .deb over a folder that is made. Raises ToolFailed when it is none."""
    into.mkdir(parents=True, exist_ok=True)
    shown = run(["dpkg-deb", "--field", archive, "Package", "Version", "Pre-Depends", "Depends"])
    fields = dict(re.findall(r"^([A-Za-z-]+): *(.*)$", shown, re.MULTILINE))
    run(["dpkg-deb", "--extract", archive, into], timeout=_PATIENCE)
    wanted = ",".join(filter(None, (fields.get("Pre-Depends"), fields.get("Depends"))))
    needs = tuple(word.split()[0].split(":")[0] for word in wanted.split(",") if word.strip())
    return Package(fields["Package"], fields["Version"], needs)


def with_libraries(names: Iterable[str], into: Path) -> list[Package]:
    """Unpack these packages and all the libraries that they depend on; what was unpacked, by name. Raises as above."""
    found: dict[str, Package] = {}
    waiting = sorted(set(names))
    while waiting:
        with tempfile.TemporaryDirectory() as scratch:
            for archive in download(waiting, Path(scratch)):
                package = unpack(archive, into)
                found[package.name] = package
        needed = {need for name in waiting if name in found for need in found[name].needs}
        waiting = sorted(need for need in needed - found.keys() if need.startswith(("lib", "zlib")))
    return [found[name] for name in sorted(found)]


def _with_lists(attempt: Callable[[], str]) -> str:
    """A fresh machine has no lists of packages, and old lists name packages that are gone: fetch them and try again."""
    try:
        return attempt()
    except ToolFailed:
        run(["apt-get", "-q", "update"], timeout=_PATIENCE)
        return attempt()
