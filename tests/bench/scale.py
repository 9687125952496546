"""What grows with the disk or with history, measured without one: huge maps, huge sparse disks, many points.

    diff_1tib       two maps of a full 1 TiB disk that differ in 1 % of its chunks, scattered; the store alone
    sparse_8tib     first point of a qcow2 of 8 TiB that holds 64 MiB, of a domain that is shut off
    sparse_live     the same of a raw disk of 1 TiB in a running QEMU, which tells of each MiB that it is zero
    points_10000    10 000 points of one domain, listed by the command line
    tap_day         a day of continuous capture in minutes (tests/bench/day.py)

Maps and points are made of random ids by the store's own builders, without any content behind them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from appliance.config import Home
from appliance.model import DiskPoint, MapRef, Point, PointStats
from appliance.service import Session, setup
from appliance.store import Key, Repository, open_backend
from appliance.store.mapbuild import build
from appliance.units import CHUNK, GiB, MiB, TiB
from tests.bench.day import tap_day
from tests.bench.measure import Cost, measure
from tests.support.bare import Machine

__all__ = ["SCALE"]

Say = Callable[[str], None]
_UUID = "8d0a4f0e-6f0c-4d8e-9d6e-0000000be9c0"


# --- diff of two maps ---


def diff_1tib(quick: bool, say: Say) -> dict[str, Any]:
    """In a process of its own for each try, so that nothing is in its caches but what the kernel holds."""
    size = 128 * GiB if quick else TiB
    with _scratch() as name:
        folder = Path(name)
        refs, built = _maps(folder, size)
        say(f"diff_1tib: two maps of {size // GiB} GiB made in {built:.0f} s")
        tries = [_child("diff", folder, *refs) for _ in range(1 if quick else 3)]
        stored = sum(path.stat().st_size for path in (folder / "repo").rglob("*") if path.is_file())
    best = min(tries, key=lambda one: one["cpu_seconds"])
    return {
        "size_bytes": size, "chunks": best["chunks"], "diff_seconds": best["seconds"],
        "diff_cpu_seconds": best["cpu_seconds"], "peak_rss_bytes": best["peak_rss_bytes"],
        "tries_seconds": [one["seconds"] for one in tries], "repository_bytes": stored,
        "build_seconds": round(built, 1), "reduced": quick,
    }  # fmt: skip


def _maps(folder: Path, size: int) -> tuple[list[str], float]:
    key = Key.generate()
    key.save(folder / "key")
    began = time.monotonic()
    with Repository.create(open_backend(str(folder / "repo")), cache=folder / "cache", key=key) as repo:
        dice = random.Random(1)
        count = size // CHUNK
        with repo.writer() as writer:
            old = build(repo.blocks, repo.codec, writer, None, size, _ids(range(count)), _anything)
            changed = sorted(dice.sample(range(count), count // 100))
            new = build(repo.blocks, repo.codec, writer, old, size, _ids(changed), _anything)
    return [f"{one.root.hex()}:{one.size}:{one.place}" for one in (old, new)], time.monotonic() - began


def _ids(indexes) -> Iterator[tuple[int, bytes]]:
    for index in indexes:
        yield index, os.urandom(16)


def _anything(_chunk: bytes) -> None:
    """No chunk is asked for: there are none."""


def _diff(folder: Path, *refs: str) -> dict[str, Any]:
    split = (ref.split(":") for ref in refs)
    old, new = (MapRef(bytes.fromhex(root), int(size), int(place)) for root, size, place in split)
    key = Key.load(folder / "key")
    with Repository.open(open_backend(str(folder / "repo")), cache=folder / "cache", key=key) as repo:
        began, used = time.monotonic(), time.process_time()
        chunks = sum(1 for _ in repo.diff(old, new))
        return {
            "chunks": chunks, "seconds": round(time.monotonic() - began, 3),
            "cpu_seconds": round(time.process_time() - used, 3),
        }  # fmt: skip


# --- a huge sparse disk ---


def sparse_8tib(quick: bool, say: Say) -> dict[str, Any]:
    return _first_points("qcow2", 8 * TiB, say, running=False) | {"reduced": False}


def sparse_live(quick: bool, say: Say) -> dict[str, Any]:
    return _first_points("raw", 128 * GiB if quick else TiB, say, running=True) | {"reduced": quick}


def _first_points(form: str, size: int, say: Say, *, running: bool) -> dict[str, Any]:
    """The first point and the next one; memory is that of all processes of ours, QEMU's not."""
    with _scratch() as name:
        folder = Path(name)
        image = folder / f"disk.{form}"
        _sparse(image, form, size)
        machine = Machine(folder, {"vda": image})
        base = ["rewind", "--home", str(folder / "home"), "--connect", machine.uri, "--json"]
        if running:
            machine.start()
        try:
            _quiet([*base, "init"])
            _quiet([*base, "protect", "bare"])
            lasting = [machine.process.pid] if running else []
            first = measure(lambda: _quiet([*base, "point", "bare"]), lasting)
            say(f"{form} of {size // GiB} GiB: first point: {first.seconds:.1f} s, {first.rss >> 20} MiB")
            second = measure(lambda: _quiet([*base, "point", "bare"]), lasting)
        finally:
            if running:
                machine.quit()
    return {
        "size_bytes": size, "format": form, "peak_rss_bytes": first.rss, "peak_private_bytes": first.private,
        **_costs("first", first), **_costs("second", second),
    }  # fmt: skip


def _sparse(image: Path, form: str, size: int) -> None:
    """64 MiB in pieces of 64 KiB, evenly spread."""
    raw = image.with_suffix(".raw")
    dice = random.Random(size)
    with raw.open("wb") as file:
        file.truncate(size)
        for number in range(64 * MiB // CHUNK):
            file.seek(number * (size // 1024) // CHUNK * CHUNK)
            file.write(dice.randbytes(CHUNK))
    if form != "raw":
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, raw, image], check=True)
        raw.unlink()


# --- many points ---


def points_10000(quick: bool, say: Say) -> dict[str, Any]:
    """Listed with the catalogue as it is after the last point, and without one."""
    count = 10_000  # cheap enough for every run
    with _scratch() as name:
        folder = Path(name)
        began = time.monotonic()
        _points(folder, count)
        say(f"points_10000: {count} points made in {time.monotonic() - began:.0f} s")
        home = Home(folder / "home")
        words = ["rewind", "--home", str(home.path), "--json", "points", "history"]
        without = measure(lambda: _quiet(words))
        tries = [measure(lambda: _quiet(words)) for _ in range(3)]
        best = min(tries, key=lambda one: one.cpu)
        start = min((measure(lambda: _quiet(["rewind", "--version"])) for _ in range(3)), key=lambda one: one.cpu)
        inside = [_child("list", folder) for _ in range(3)]
    return {
        "points": count, "list_seconds": min(one["seconds"] for one in inside),
        "list_cpu_seconds": min(one["cpu_seconds"] for one in inside), "peak_rss_bytes": best.rss,
        **_costs("command", best), **_costs("without_catalogue", without), **_costs("command_doing_nothing", start),
        "reduced": False,
    }  # fmt: skip


def _points(folder: Path, count: int) -> None:
    """A day of points, one each 8 s, of a disk of which each changed ten chunks."""
    home, begin = Home(folder / "home"), datetime(2026, 1, 1, tzinfo=UTC)
    with Session(home, settings_file=folder / "none.yaml") as session:
        setup.init(session, None)
        repo, parent, ref = session.repository, None, None
        with repo.writer() as writer:
            held = [writer.put(os.urandom(CHUNK)) for _ in range(16)]
            for number in range(count):
                dice = random.Random(number)
                changed = sorted(dice.sample(range(16384), 10))
                ref = build(repo.blocks, repo.codec, writer, ref, GiB, ((i, dice.choice(held)) for i in changed),
                            _anything)  # fmt: skip
                if number % 100 == 99:
                    writer.flush()
                _commit(session, f"{number:016x}", parent, ref, begin + timedelta(seconds=8 * number), changed, writer)
                parent = f"{number:016x}"


def _commit(session, name, parent, ref, when, changed, writer) -> None:
    """As `Repository.commit` writes it, without asking for each whether all is there: most of it is not flushed."""
    from appliance.store import manifest

    disk = DiskPoint("vda", GiB, ref, changed_bytes=10 * CHUNK, changed=tuple(changed), format="qcow2", source="/x")
    point = Point(name, "history", _UUID, "qemu:///system", when, "t" * 16, parent, (disk,), stats=PointStats(1, 1, 1))
    repo = session.repository
    repo.backend.put(manifest.point_name(_UUID, name), manifest.encode_point(repo.codec, point))


def _list(folder: Path) -> dict[str, Any]:
    """What the verb does, without starting Python."""
    from appliance.service import history

    with Session(Home(folder / "home"), settings_file=folder / "none.yaml") as session:
        began, used = time.monotonic(), time.process_time()
        found = history.history(session, "history")
        return {
            "points": len(found.points), "seconds": round(time.monotonic() - began, 4),
            "cpu_seconds": round(time.process_time() - used, 4),
        }  # fmt: skip


# --- tools ---


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rewind-scale-", dir="/var/tmp")


def _costs(name: str, cost: Cost) -> dict[str, Any]:
    return {f"{name}_seconds": round(cost.seconds, 3), f"{name}_cpu_seconds": round(cost.cpu, 3)}


def _quiet(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")


def _child(*words: Any) -> dict[str, Any]:
    """This module in a process of its own, with the peak of its memory."""
    argv = [sys.executable, "-m", "tests.bench.scale", *map(str, words)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    out = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit status {process.returncode}")
    return json.loads(out) | {"peak_rss_bytes": usage.ru_maxrss * 1024}


SCALE = {
    "diff_1tib": diff_1tib, "sparse_8tib": sparse_8tib, "sparse_live": sparse_live, "points_10000": points_10000,
    "tap_day": tap_day,
}  # fmt: skip

if __name__ == "__main__":
    verb, folder, *rest = sys.argv[1:]
    print(json.dumps({"diff": _diff, "list": _list}[verb](Path(folder), *rest)))
