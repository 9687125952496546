"""./dev bench tap: what a guest's writes cost when they are captured continuously.

    fio ─nbd─► QEMU ─► disk                                             none
                    └► rw-tpg ► mirror ► rw-tpf ► disk
                                   └─nbd─► nbdkit null                  floor: what the method itself costs
                                   └─nbd─► nbdkit with our journal      tap

One QEMU without a machine holds three equal disks, with the graph of `hypervisor.graph.tap` over two of them; fio
drives them through QEMU's own NBD server. The three take turns, backwards every other round, and each round is
compared with itself. Disks and journal lie in memory, so that the path is measured and not somebody's disk; `--spool`
moves the journal to a real one, `--disks` the disks.

    granularity     neighbours at depth 16 under mirrors of 4 KiB and of 64 KiB, both to `null`
    pause           of attaching one and two disks of a guest of libvirt
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.capture.tap import _NICE, _THREADS
from appliance.hypervisor.base import Disk
from appliance.hypervisor.graph import base, seat, tap
from appliance.hypervisor.qmp import Connection
from appliance.journal import Control
from appliance.journal.build import build
from appliance.nbdkit import Server
from tests.bench import figures, tap_figures
from tests.bench.measure import busy_seconds, cpu_clock
from tests.bench.rows import say
from tests.bench.tap_figures import CELLS, VARIANTS, Cell, Turn
from tests.bench.tap_pause import pauses

__all__ = ["measure_tap", "options"]

KiB, MiB = 1 << 10, 1 << 20
_MEMORY = "/dev/shm"
# QEMU serves, and asks of a sink, at most this many requests of one connection at once.
_EACH = 16


@dataclass(frozen=True, slots=True)
class Options:
    """`seconds` is the length of one turn; `disks` and `spool` are folders in which new ones are made."""

    quick: bool
    rounds: int
    seconds: float
    size: int
    threads: int
    disks: Path
    spool: Path
    cells: tuple[Cell, ...]
    parts: tuple[str, ...]


def options(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="./dev bench tap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of short turns")
    parser.add_argument("--rounds", type=int, help="default 10, with --quick 2; an even number is fair")
    parser.add_argument("--seconds", type=float, help="of one turn (default 1, with --quick 0.4)")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of each of the disks (default 256)")
    parser.add_argument("--disks", type=Path, default=Path(_MEMORY), metavar="FOLDER", help="default in memory")
    parser.add_argument("--spool", type=Path, default=Path(_MEMORY), metavar="FOLDER", help="default in memory")
    parser.add_argument("--threads", type=int, default=_THREADS, help="of both sinks (default: as the product)")
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cell", action="append", choices=names, metavar="NAME", help=f"only these: {' '.join(names)}")
    parts = ("cells", "granularity", "pause")
    parser.add_argument("--part", action="append", choices=parts, help="only these; may be repeated")
    given = parser.parse_args(argv)
    return Options(
        given.quick, given.rounds or (2 if given.quick else 10), given.seconds or (0.4 if given.quick else 1.0),
        given.size * MiB, given.threads, given.disks, given.spool,
        tuple(cell for cell in CELLS if cell.name in (given.cell or names)), tuple(given.part or parts),
    )  # fmt: skip


def measure_tap(chosen: Options) -> dict[str, Any]:
    """The part of the document that is about the tap."""
    found: dict[str, Any] = {
        "rounds": chosen.rounds, "seconds_of_a_turn": chosen.seconds, "disk_bytes": chosen.size,
        "threads": chosen.threads, "disks_on": _file_system(chosen.disks), "spool_on": _file_system(chosen.spool),
    }  # fmt: skip
    if "cells" in chosen.parts:
        found["cells"] = tap_figures.cells(_rounds(chosen))
        found["goals"] = tap_figures.goals(found["cells"])
    if "granularity" in chosen.parts:
        found["granularity"] = _granularity(chosen)
    if "pause" in chosen.parts:
        found["pause"] = pauses(4 if chosen.quick else 20)
    return found


def _file_system(folder: Path) -> str:
    told = subprocess.run(["stat", "-f", "-c", "%T", folder], check=True, capture_output=True, text=True)
    return told.stdout.strip()


def _rounds(chosen: Options) -> dict[Cell, dict[str, list[Turn]]]:
    found: dict[Cell, dict[str, list[Turn]]] = {cell: {name: [] for name in VARIANTS} for cell in chosen.cells}
    with Bench(chosen) as bench:
        for name in VARIANTS:  # all blocks are there, and QEMU's threads, before anything is measured
            bench.turn(name, Cell("warm", "write", MiB, 4), max(0.3, chosen.size / (200 * MiB)))
        for number in range(chosen.rounds):
            say(f"tap: round {number + 1} of {chosen.rounds}")
            for cell in chosen.cells:
                for name in figures.order(VARIANTS, number):
                    found[cell][name].append(bench.turn(name, cell, chosen.seconds))
    return found


def _granularity(chosen: Options) -> dict[str, Any]:
    """Neighbours of 4 KiB at depth 16: with a coarse mirror those in the same piece may wait for each other."""
    cells = (Cell("sequential", "write", 4 * KiB, 16), Cell("within_1m", "randwrite", 4 * KiB, 16, span=MiB))
    names = ("floor", "coarse")
    turns: dict[Cell, dict[str, list[Turn]]] = {cell: {name: [] for name in names} for cell in cells}
    with Bench(chosen, coarse=True) as bench:
        for number in range(chosen.rounds):
            for cell in cells:
                for name in figures.order(names, number):
                    turns[cell][name].append(bench.turn(name, cell, chosen.seconds))
    return {
        cell.name: {
            "4096": tap_figures.summary(found["floor"]), "65536": tap_figures.summary(found["coarse"]),
            "65536_against_4096": tap_figures.against(found["coarse"], found["floor"]),
        }
        for cell, found in turns.items()
    }  # fmt: skip


class Bench:
    """QEMU with its disks and the two sinks; all of it is gone at the end. With `coarse` there is one disk more, under
    a mirror of 64 KiB to `null`. Used by one thread."""

    def __init__(self, chosen: Options, *, coarse: bool = False) -> None:
        self._size, self._threads = chosen.size, chosen.threads
        self._stack = contextlib.ExitStack()
        self._names = (*VARIANTS, "coarse") if coarse else VARIANTS
        self._run = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rewind-tap-")))
        self._disks = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rewind-", dir=chosen.disks)))
        self._spool = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rewind-", dir=chosen.spool)))
        self._sinks: dict[str, int] = {}

    def __enter__(self) -> Bench:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self._start_qemu()
        null = Server(
            Path("null"), self._run / "null.sock", [("size", str(self._size))], threads=self._threads, nice=_NICE
        )
        control = self._run / "control"
        parameters: list[tuple[str, str | os.PathLike[str]]] = [
            ("spool", self._spool), ("disk", f"tap:{self._size}"), ("control", control)
        ]  # fmt: skip
        journal = Server(build(), self._run / "journal.sock", parameters, threads=self._threads, nice=_NICE)
        for server in (null, journal):
            server.start()
            self._stack.callback(server.stop)
        self._control = Control(control, 30)
        self._sinks = {"floor": null.pid, "coarse": null.pid, "tap": journal.pid}
        sockets = {"floor": null.socket, "coarse": null.socket, "tap": journal.socket}
        self._stack.callback(self._end_qemu)  # before its sinks
        for name in self._names:
            self._export(name, sockets.get(name))

    def _start_qemu(self) -> None:
        argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none",
                "-qmp", f"unix:{self._run}/qmp,server=on,wait=off"]  # fmt: skip
        self._qemu = self._stack.enter_context(subprocess.Popen(argv, stdin=subprocess.DEVNULL))
        self._stack.callback(self._qemu.kill)
        limit = time.monotonic() + 10
        while not (self._run / "qmp").exists():
            if self._qemu.poll() is not None or time.monotonic() > limit:
                raise RuntimeError("QEMU does not start")
            time.sleep(0.01)
        self._monitor = Connection(self._run / "qmp", "bench")
        server = {"type": "unix", "data": {"path": f"{self._run}/export"}}
        self._monitor.execute("nbd-server-start", addr=server)

    def _end_qemu(self) -> None:
        self._monitor.close()
        self._qemu.kill()
        self._qemu.wait()

    def _export(self, name: str, sink: Path | None) -> None:
        path = self._disks / name
        path.touch()
        os.truncate(path, self._size)
        file = {"driver": "file", "filename": str(path)}
        self._monitor.execute("blockdev-add", driver="raw", node_name=f"disk-{name}", file=file)
        node = f"disk-{name}"
        if sink is not None:
            node = self._tap(Disk(target=name, source=str(path), format="raw", size=self._size, node=node), sink)
        self._monitor.execute("block-export-add", type="nbd", id=name, node_name=node, name=name, writable=True)

    def _tap(self, disk: Disk, sink: Path) -> str:
        """What `tap.attach` does but for the device, which is an export here."""
        with _granularity_of(64 * KiB) if disk.target == "coarse" else contextlib.nullcontext():
            tap._build(self._monitor, disk, sink)
        tap._await_ready(self._monitor, [disk])
        seat.reopen(self._monitor, seat.tap_name("f", disk.target), disk.node)
        return seat.tap_name("g", disk.target)

    def turn(self, name: str, cell: Cell, seconds: float) -> Turn:
        """One run of fio over one of the disks. What it wrote into the journal is deleted afterwards."""
        pids = [self._qemu.pid, *([self._sinks[name]] if name in self._sinks else [])]
        clocks = [cpu_clock(pid) for pid in pids]
        busy, children = busy_seconds(), _children()
        before = time.monotonic()
        job = self._fio(name, cell, seconds)
        wall = time.monotonic() - before
        used = [cpu_clock(pid) - clock for pid, clock in zip(pids, clocks, strict=True)]
        others = max(0.0, busy_seconds() - busy - sum(used) - (_children() - children)) / wall
        percentiles = job["clat_ns"]["percentile"]
        return Turn(
            job["iops"], job["io_bytes"], percentiles["50.000000"] / 1e3, percentiles["99.000000"] / 1e3, used[0],
            sum(used[1:]), self._recorded() if name == "tap" else 0, others,
        )  # fmt: skip

    def _fio(self, name: str, cell: Cell, seconds: float) -> dict[str, Any]:
        jobs = -(-cell.depth // _EACH)
        uri = f"nbd+unix:///{name}?socket={self._run}/export"
        span = min(cell.span or self._size, self._size) // jobs
        done = subprocess.run(
            [
                "fio", "--name=tap", "--ioengine=nbd", f"--uri={uri}", f"--rw={cell.kind}", f"--bs={cell.block}",
                f"--iodepth={cell.depth // jobs}", f"--numjobs={jobs}", "--thread", "--group_reporting",
                f"--size={span}", f"--offset_increment={span}", "--time_based", f"--runtime={seconds * 1000:.0f}ms",
                "--norandommap", "--randrepeat=0", "--percentile_list=50:99", "--output-format=json",
            ],
            check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        document = json.loads(done.stdout[done.stdout.index("{") :])
        written: dict[str, Any] = document["jobs"][0]["write"]
        if document["jobs"][0]["error"] or not written["io_bytes"]:
            raise RuntimeError(f"{name}: fio wrote nothing: {done.stdout}")
        return written

    def _recorded(self) -> int:
        """Bytes of files that the journal made since the last call. Raises RuntimeError if it has lost its mirror."""
        jobs = {str(job["id"]): str(job["status"]) for job in base.jobs(self._monitor)}
        if jobs.get(seat.tap_name("j", "tap"), "") not in ("ready", "standby"):
            raise RuntimeError("the mirror to the journal has ended")
        upto = self._control.seal()
        size = sum(path.stat().st_size for path in self._spool.glob("*.rwj"))
        self._control.forget(upto)
        return size


@contextlib.contextmanager
def _granularity_of(size: int) -> Iterator[None]:
    before, tap._GRANULARITY = tap._GRANULARITY, size
    try:
        yield
    finally:
        tap._GRANULARITY = before


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
