"""./dev bench stream: how long until the service of a machine is there whose disks are far away.

A real Debian (MBR, one ext4) comes up on hardware that it has never seen (UEFI, NVMe, vmxnet3), emulated, over a line
of `--mbit` in each direction and `--ms` there and back (tests/support/farline.py says what that models and what not).

    stream       `rewind image serve --stream`: the root comes by the line, its disk fills once the service is there
    copy-first   `rewind image serve --copy-first --blank`: what has data is copied, then the same kernel goes on
    two-boot     the usual way: a rescue system is booted and copies the whole disk; then the machine is started again

Of the two-boot way only what nobody could leave out is measured. Its rescue system is our own initrd, which is up in
seconds; nothing is repaired, no initramfs is made; and the machine is switched on again at once. The second boot has
the image's drivers, as if the repair had been done.

    seconds      from the power on (of the first boot) to the first answer of its service, on this host's clock
    boots        kernels that started until then
    line_bytes   that came over the line until then, encrypted
    read_bytes   that the machine has read by its link: of `stream` when its system was up, else when it let go
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config import Home
from appliance.extents import Extent
from appliance.restore import control, streams
from tests.bench.rows import say
from tests.guests import clients
from tests.support import world
from tests.support.farline import FarLine
from tests.support.imagery import Imagery
from tests.support.rack import DISK_BYTES, NAME, TARGET, Running, empty_disk, served, wait_until

__all__ = ["WAYS", "measure_stream", "options"]

_ALONE = "starting from them alone"
_KERNEL = "Linux version"
_PATIENCE = 1800.0


@dataclass(frozen=True, slots=True)
class Options:
    """`end`: also until the disk is full."""

    mbit: float
    ms: float
    ways: tuple[str, ...]
    end: bool


def options(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="./dev bench stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=100, help="of the line, in each direction (default 100)")
    parser.add_argument("--ms", type=float, default=40, help="there and back (default 40)")
    parser.add_argument("--way", action="append", choices=[*WAYS], help="only these; may be repeated")
    parser.add_argument("--end", action="store_true", help="stream: also until the disk is full, and alone")
    given = parser.parse_args(argv)
    return Options(given.mbit, given.ms, tuple(given.way or WAYS), given.end)


def measure_stream(chosen: Options) -> dict[str, Any]:
    """The part of the document that is about streaming."""
    found: dict[str, Any] = {
        "line": {"mbit": chosen.mbit, "ms": chosen.ms}, "client": "Debian, MBR, ext4", "target": TARGET.name,
        "disk_bytes": DISK_BYTES, "ways": {},
    }  # fmt: skip
    client = clients.build("mbr")
    with Imagery(world.images_folder("bench"), client) as imagery:
        imagery.add_target(TARGET)
        for way in chosen.ways:
            with tempfile.TemporaryDirectory() as folder:
                found["ways"][way] = WAYS[way](imagery, Path(folder), chosen)
            say(f"{way}: {found['ways'][way]}")
    found["times_as_long"] = _ratios(found["ways"])
    return found


def _ratios(ways: dict[str, Any]) -> dict[str, float]:
    """Of the seconds of others to those of `stream`."""
    if "stream" not in ways:
        return {}
    return {name: round(one["seconds"] / ways["stream"]["seconds"], 2) for name, one in ways.items()}


@contextmanager
def _far(imagery: Imagery, folder: Path, chosen: Options, *how: str) -> Iterator[tuple[Any, Any, FarLine]]:
    """A session at the other end of the line."""
    lines: list[FarLine] = []

    def lay(port: int) -> int:
        lines.append(FarLine("127.0.0.1", port, mbit=chosen.mbit, ms=chosen.ms).__enter__())
        return lines[0].port

    try:
        with served(imagery, folder / "image", *how, reach=lay) as (medium, state):
            yield medium, state, lines[0]
    finally:
        for line in lines:
            line.__exit__(None, None, None)


def _stream(imagery: Imagery, folder: Path, chosen: Options) -> dict[str, Any]:
    disk = empty_disk(folder / "disk.raw")
    with _far(imagery, folder, chosen) as (medium, state, line):
        with Running(disk, medium, folder / "first") as machine:
            found = _until_service(machine, line)
            now = wait_until(state, "pulling", 300)
            found |= {"guest_seconds": now["service_seconds"], "read_bytes": now["service_read_bytes"]}
            if chosen.end:
                now = wait_until(state, "done", _PATIENCE)
                seconds = round(time.monotonic() - machine.begun, 1)
                found |= {"end_seconds": seconds, "end_read_bytes": now["read_bytes"], "end_line_bytes": line.down}
        return found


def _copy_first(imagery: Imagery, folder: Path, chosen: Options) -> dict[str, Any]:
    disk = empty_disk(folder / "disk.raw")
    with _far(imagery, folder, chosen, "--copy-first", "--blank") as (medium, state, line):
        with Running(disk, medium, folder / "first") as machine:
            return _until_service(machine, line) | {"read_bytes": state()["read_bytes"]}


def _two_boot(imagery: Imagery, folder: Path, chosen: Options) -> dict[str, Any]:
    disk = empty_disk(folder / "disk.raw")
    with _far(imagery, folder, chosen, "--copy-first") as (medium, state, line):
        _copy_all(imagery)
        with Running(disk, medium, folder / "rescue") as rescue:
            rescue.wait_for(_ALONE, _PATIENCE)
            begun, console = rescue.begun, rescue.console
        with Running(disk, medium, folder / "client") as machine:
            found = _until_service(machine, line) | {"read_bytes": state()["read_bytes"]}
            seconds = round(machine.begun - begun, 1)
            return found | {
                "seconds": round(found["seconds"] + seconds, 1), "rescue_seconds": seconds,
                "boots": found["boots"] + console.count(_KERNEL),
            }  # fmt: skip


def _copy_all(imagery: Imagery) -> None:
    """Who copies a disk by what it looks like from outside copies all of it. The list is read when a machine comes."""
    home = Home(imagery.home)
    order = streams.load(home, NAME)
    assert order is not None
    path = streams.folder(home, NAME) / control.CONTROL
    path.unlink()
    control.create(path, {disk: [Extent(0, ref.size, False)] for disk, ref in order.exports.items()})


def _until_service(machine: Running, line: FarLine) -> dict[str, Any]:
    machine.until_service(_PATIENCE)
    seconds = round(time.monotonic() - machine.begun, 1)
    return {"seconds": seconds, "boots": machine.console.count(_KERNEL), "line_bytes": line.down}


WAYS: dict[str, Callable[[Imagery, Path, Options], dict[str, Any]]] = {
    "stream": _stream, "copy-first": _copy_first, "two-boot": _two_boot,
}  # fmt: skip
