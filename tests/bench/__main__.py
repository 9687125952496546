"""./dev bench: every figure as one JSON document.

Read the ratios, not the seconds: contenders take turns, in the opposite order every other round, and each round is
compared with itself. Nothing fails because it is slow.

    rows    first_full epoch diff diff_exact check restore export_read revert_live revert_offline
            diff_1tib sparse_8tib sparse_live points_10000
            tap_day     a day of continuous capture in minutes: its size after retention, any instant's first byte
    tap     ./dev bench tap --help: what continuous capture costs the guest
    stream  ./dev bench stream --help: how long a machine takes whose disks are far away
    images  ./dev bench images --help: what a bootable image costs, alone and eight at once
    beside  nbdcopy (the floor), disk, virtnbdbackup, restic, borg, where they do the same work and are installed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench import disk, figures, images, stream, tap
from tests.bench.contenders import ALL
from tests.bench.measure import steal_seconds
from tests.bench.rows import ROWS, Rounds, say
from tests.bench.scale import SCALE
from tests.support import world

GiB, MiB = 1 << 30, 1 << 20

_VERSIONS = {
    "qemu": "qemu-system-x86_64 --version", "libvirt": "virsh --version", "nbdkit": "nbdkit --version",
    "nbdcopy": "nbdcopy --version", "virtnbdbackup": "virtnbdbackup --version", "restic": "restic version",
    "borg": "borg --version", "fio": "fio --version",
}  # fmt: skip


# What is measured by itself: its options, and what makes its part of the document.
_PARTS: dict[str, tuple[Callable[[Sequence[str]], Any], Callable[[Any], dict[str, Any]]]] = {
    "tap": (tap.options, tap.measure_tap),
    "stream": (stream.options, stream.measure_stream),
    "images": (images.options, images.measure_images),
}


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in _PARTS:
        return _part(sys.argv[1], sys.argv[2:])
    options = _options()
    began, stolen = time.monotonic(), steal_seconds()
    document: dict[str, Any] = {"type": "bench", "quick": options.quick, "machine": _machine()}
    rows = [row for row in ROWS if row in options.row]
    document |= _on_one_disk(options, rows) if rows else {"rows": []}
    document["scale"] = {}
    for name in (name for name in SCALE if name in options.row):
        say(name)
        document["scale"][name] = SCALE[name](options.quick, say)
    document["goals"] = figures.goals(document)
    _end(document, began, stolen)
    return 0


def _part(name: str, argv: Sequence[str]) -> int:
    options, measured = _PARTS[name]
    chosen = options(argv)
    began, stolen = time.monotonic(), steal_seconds()
    document = {"type": f"bench_{name}", "quick": getattr(chosen, "quick", False), "machine": _machine()}
    document |= measured(chosen)
    _end(document, began, stolen)
    return 0


def _end(document: dict[str, Any], began: float, stolen: float) -> None:
    document["machine"]["load_at_the_end"] = os.getloadavg()
    document["machine"]["stolen_seconds"] = round(steal_seconds() - stolen, 1)
    document["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(document, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a disk of 1 GiB, two rounds, an eighth of the large ones")
    parser.add_argument("--size", type=int, metavar="MIB", help="of the disk, a multiple of 128 (default 8192)")
    parser.add_argument("--rounds", type=int, help="default 4, with --quick 2; an even number is fair")
    parser.add_argument("--row", action="append", choices=[*ROWS, *SCALE], help="only these; may be repeated")
    parser.add_argument("--beside", action="append", choices=[one.name for one in ALL], metavar="NAME",
                        help="only these contenders, and rewind; may be repeated")  # fmt: skip
    options = parser.parse_args()
    options.row = options.row or [*ROWS, *SCALE]
    options.size = (options.size or (1024 if options.quick else 8192)) * MiB
    options.rounds = options.rounds or (2 if options.quick else 4)
    if options.size % (128 * MiB):
        parser.error("--size must be a multiple of 128")
    return options


def _on_one_disk(options: argparse.Namespace, rows: list[str]) -> dict[str, Any]:
    say(f"the disk of {options.size // MiB} MiB")
    prepared = disk.prepare(options.size)
    folder = world.images_folder("bench")
    names = {"rewind", *options.beside} if options.beside else set()
    rounds = Rounds(folder, prepared, rows, names)
    rounds.run(options.rounds)
    return {
        "disk": {"bytes": prepared.size, "data_bytes": rounds.data, "bytes_of_files": prepared.files},
        "rounds": options.rounds,
        "rows": rounds.document(),
        "left_out": rounds.left_out,
    }


def _machine() -> dict[str, Any]:
    return {
        "processors": os.cpu_count(), "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(), "python": platform.python_version(), "debian": _release(),
        "load_at_the_start": os.getloadavg(), "versions": {name: _version(how) for name, how in _VERSIONS.items()},
    }  # fmt: skip


def _release() -> str:
    path = Path("/etc/debian_version")
    return path.read_text().strip() if path.exists() else ""


def _version(how: str) -> str | None:
    try:
        done = subprocess.run(how.split(), capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).splitlines()
    return lines[0] if lines else None


if __name__ == "__main__":
    sys.exit(main())
