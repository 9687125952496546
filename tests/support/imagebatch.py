"""Several builds of images, one after the other and all at once, each a call of the program.

    jobs([mbr, dracut])        eight: two clients, two instants, two targets with a medium each
    build(job, folder)         FOLDER/NAME, and the record that the program printed
    at_once(jobs, folder)      all in processes of their own, started together
    contents(folder / NAME)    what has to be equal in two builds of one job
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.imagery import Imagery
from tests.support.targets import TARGETS, Target

__all__ = ["Job", "at_once", "build", "contents", "jobs"]

# A target and the medium that its firmware starts from.
_WANTED = (("nvme-vmxnet3-uefi", "esp"), ("megasas-rtl8139-bios", "iso"))


@dataclass(frozen=True, slots=True)
class Job:
    """One image."""

    imagery: Imagery
    target: Target
    instant: str
    medium: str

    @property
    def name(self) -> str:
        return f"{self.imagery.client.name}-{self.instant}-{self.target.name}"


def jobs(imageries: Iterable[Imagery]) -> list[Job]:
    """Four of each client; its home knows the targets afterwards."""
    found = []
    for imagery in imageries:
        for name, medium in _WANTED:
            imagery.add_target(TARGETS[name])
            found += [Job(imagery, TARGETS[name], instant, medium) for instant in ("first", "second")]
    return found


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Raises AssertionError when the program fails."""
    return job.imagery.build(job.target, job.instant, job.medium, folder / job.name)


def at_once(wanted: Sequence[Job], folder: Path) -> dict[str, dict[str, Any]]:
    """Name → record, when the last one has ended. Raises what the first that failed did, also then."""
    with ThreadPoolExecutor(len(wanted)) as pool:
        records = pool.map(lambda job: build(job, folder), wanted)
        return {job.name: record for job, record in zip(wanted, records, strict=True)}


def contents(image: Path) -> dict[str, Any]:
    """Every file by its path with its hash, and of the report all but what tells of the run."""
    found: dict[str, Any] = {}
    for path in sorted(one for one in image.rglob("*") if one.is_file()):
        name = str(path.relative_to(image))
        if name == "report.json":
            found[name] = json.loads(path.read_text())["image"]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
