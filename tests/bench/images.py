"""./dev bench images: what a bootable image costs, alone and when eight are made at once.

    alone       the builds of two clients, two instants and two targets, one after the other
    at_once     the same ones, in processes that are started together
    parts       where the time of a build goes: the program's start, the plan, and the steps that it tells itself

Alone and at once take turns, backwards every other round, and each round is compared with itself. Every image of a
round has to be equal to its twin, to the last byte. The clients are Debians whose points lie in a repository of their
own; the first run builds them, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import figures
from tests.bench.measure import Cost, measure
from tests.bench.rows import say
from tests.guests import clients
from tests.support import world
from tests.support.imagebatch import Job, at_once, build, contents, jobs
from tests.support.imagery import Imagery

__all__ = ["document", "measure_images", "options"]


@dataclass
class Found:
    """Costs by the round: of each build alone, and of all at once. `records` are what the program said last; `unequal`
    are the builds that were not what they had been alone."""

    alone: dict[str, list[Cost]] = field(default_factory=dict)
    together: list[Cost] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    unequal: set[str] = field(default_factory=set)


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one client, one round")
    parser.add_argument("--rounds", type=int, help="default 4, with --quick 1; an even number is fair")
    chosen = parser.parse_args(argv)
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 4)
    return chosen


def measure_images(chosen: argparse.Namespace) -> dict[str, Any]:
    """The part of the document that is about images."""
    names: list[clients.Name] = ["mbr"] if chosen.quick else ["mbr", "dracut"]
    with _imageries(names) as imageries:
        wanted, found = jobs(imageries), Found()
        for imagery in imageries:  # templates are unpacked, and files are in memory, before anything is measured
            say(f"images: {imagery.client.name} is planned once")
            imagery.plan(wanted[0].target, "first")
        for number in range(chosen.rounds):
            say(f"images: round {number + 1} of {chosen.rounds}")
            _round(wanted, number, found)
        parts = {job.name: _parts(job, found.records[job.name]) for job in wanted[::4]}
        sizes = {job.name: _sizes(job, found.records[job.name]) for job in wanted}
    return {"rounds": chosen.rounds, **document(found, sizes), "parts": parts}


@contextmanager
def _imageries(names: Sequence[clients.Name]) -> Iterator[list[Imagery]]:
    images = world.images_folder("bench-images")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, images, ignore_errors=True)
        yield [stack.enter_context(Imagery(images, clients.build(name))) for name in names]


# --- a round --------------------------------------------------------------------------------------------------------


def _round(wanted: Sequence[Job], number: int, found: Found) -> None:
    with tempfile.TemporaryDirectory(prefix="rewind-images-", dir="/var/tmp") as scratch:
        alone, together = Path(scratch) / "alone", Path(scratch) / "together"
        for kind in figures.order(("alone", "together"), number):
            if kind == "alone":
                _alone(wanted, alone, found)
            else:
                found.together.append(measure(lambda: at_once(wanted, together)))
        for job in wanted:
            if contents(alone / job.name) != contents(together / job.name):
                found.unequal.add(job.name)


def _alone(wanted: Sequence[Job], folder: Path, found: Found) -> None:
    for job in wanted:
        cost = measure(lambda job=job: found.records.update({job.name: build(job, folder)}))
        found.alone.setdefault(job.name, []).append(cost)


# --- what it was ----------------------------------------------------------------------------------------------------


def _parts(job: Job, record: dict[str, Any]) -> dict[str, float]:
    """Seconds of the parts of one build. The plan is what `image plan` takes without the start of the program."""
    start = min(measure(lambda: job.imagery.rewind("image", "target", "list")).seconds for _ in range(3))
    plan = min(measure(lambda: job.imagery.plan(job.target, job.instant)).seconds for _ in range(3))
    steps = {f"step_{name}": round(spent, 3) for name, spent in record["step_seconds"].items()}
    return {"start": round(start, 3), "plan": round(plan - start, 3), **steps}


def _sizes(job: Job, record: dict[str, Any]) -> dict[str, int]:
    """Bytes of the medium, and of the guest's disk: its size, and what of it is not zero."""
    disk = job.imagery.client.disk("first" if job.instant == "first" else "second")
    told = subprocess.run(["qemu-img", "map", "--output=json", disk], check=True, capture_output=True, text=True)
    extents = json.loads(told.stdout)
    files = {one["name"]: one["size_bytes"] for one in record["files"]}
    return {
        "image_bytes": files[job.medium], "initrd_bytes": files["initrd"], "kernel_bytes": files["vmlinuz"],
        "modules": len(record["modules"]), "disk_bytes": sum(one["length"] for one in extents),
        "data_bytes": sum(one["length"] for one in extents if one["data"]),
    }  # fmt: skip


def document(found: Found, sizes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Figures of all rounds. Pure."""
    rounds = range(len(found.together))
    sums = [sum(costs[number].seconds for costs in found.alone.values()) for number in rounds]
    used = [sum(costs[number].cpu for costs in found.alone.values()) for number in rounds]
    return {
        "builds": [{"name": name, **_cost(costs), **_shares(sizes[name])} for name, costs in found.alone.items()],
        "alone": {"seconds": round(statistics.median(sums), 3), "cpu_seconds": round(statistics.median(used), 3)},
        "at_once": {"builds": len(found.alone), **_cost(found.together)},
        "at_once_against_alone": {
            "seconds": figures.spread([one.seconds / sums[number] for number, one in enumerate(found.together)]),
            "cpu_seconds": figures.spread([one.cpu / used[number] for number, one in enumerate(found.together)]),
        },
        "all_equal": not found.unequal,
        "unequal": sorted(found.unequal),
    }  # fmt: skip


def _cost(costs: Sequence[Cost]) -> dict[str, Any]:
    left_out = ("mb_per_second", "cpu_seconds_per_gib")
    return {name: value for name, value in figures.summary(costs, 0).items() if name not in left_out}


def _shares(sizes: dict[str, int]) -> dict[str, Any]:
    return {**sizes, "image_per_data": round(sizes["image_bytes"] / sizes["data_bytes"], 4)}
