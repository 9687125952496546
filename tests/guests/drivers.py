"""Builds the package of drivers that a kernel for clouds lacks, from Debian's own source of that very kernel.

    build("6.1.0-56-cloud-amd64")   → a .deb with megaraid_sas, 8139too, 8139cp and mii for that release

Debian ships no modules for it beside those in its image: the generic kernel's are for another release by their
vermagic and symbol versions, and its DKMS packages are for none of these devices. So it is done as an admin would do
it: the folders of `linux-source` of the version that the kernel has, by their own makefiles, against `linux-headers` of
that release. It happens in a root of its own, since headers and their tools know each other by absolute paths.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.guests import packages

__all__ = ["build"]

# Folders and files of the source, and what of them is built.
_SOURCES = ("drivers/scsi/megaraid/", "drivers/net/ethernet/realtek/", "drivers/net/mii.c")
_KBUILD = "obj-m := drivers/scsi/megaraid/ drivers/net/ethernet/realtek/ drivers/net/mii.o\n"
_CHOSEN = ("CONFIG_MEGARAID_SAS=m", "CONFIG_8139TOO=m", "CONFIG_8139CP=m")


def build(release: str) -> Path:
    """The package, from the cache if it is there. Takes two minutes and a download of 150 MB once."""
    digest = packages.sources_digest([Path(__file__)], release)
    return packages.cached(f"extradrivers-{digest}", lambda folder: _build(folder, release)) / "drivers.deb"


def _build(folder: Path, release: str) -> None:
    root, out = folder / "root", folder / "package"
    packages.bootstrap(root, packages.release(), [f"linux-headers-{release}", "make", "kmod", "xz-utils"])
    _unpack_sources(folder, root / "src", release)
    make = ["make", "-s", "-C", f"/usr/src/linux-headers-{release}", "M=/src", *_CHOSEN]
    packages.in_root(root, *make, "modules")
    # Stripped as Debian's are: with what is for debuggers a driver has 20 MiB.
    install = ["INSTALL_MOD_PATH=/out", "INSTALL_MOD_STRIP=1", "INSTALL_MOD_DIR=updates", "modules_install"]
    packages.in_root(root, *make, *install)
    _pack(root / f"out/lib/modules/{release}/updates", out, release)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", out, folder / "drivers.deb"], check=True)
    for leftover in (root, out):
        shutil.rmtree(leftover)


def _unpack_sources(folder: Path, into: Path, release: str) -> None:
    """What is built of the source that has the version of the headers, and the makefile that says so."""
    series = re.match(r"\d+\.\d+", release)
    assert series is not None, release
    name = f"linux-source-{series.group()}"
    unpacked = folder / "source"
    packages.unpack(f"{name}={packages.version(f'linux-headers-{release}')}", unpacked)
    (archive,) = unpacked.glob("usr/src/linux-source-*.tar.xz")
    into.mkdir()
    wanted = [f"{name}/{one}" for one in _SOURCES]
    subprocess.run(["tar", "-xJf", archive, "-C", into, "--strip-components=1", *wanted], check=True)
    (into / "Kbuild").write_text(_KBUILD)
    shutil.rmtree(unpacked)


def _pack(modules: Path, out: Path, release: str) -> None:
    """What `dpkg-deb` makes the package of."""
    target = out / "usr/lib/modules" / release / "updates"
    shutil.copytree(modules, target, ignore=shutil.ignore_patterns("modules.*"))
    assert len(list(target.rglob("*.ko*"))) >= 4, list(target.rglob("*"))
    (out / "DEBIAN").mkdir()
    (out / "DEBIAN/control").write_text(
        f"Package: extra-drivers-{release}\nVersion: 1\nArchitecture: amd64\nMaintainer: Nobody <nobody@localhost>\n"
        f"Depends: linux-image-{release}\nDescription: drivers that the kernel for clouds lacks\n"
    )
