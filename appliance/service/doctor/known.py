"""QEMU builds with known defects that touch protected guests.

Each entry says which versions, whether only disks with an iothread are affected, what happens, and what helps. The
first two were measured on Debian's builds (7.2.22 and 10.0.13); the others are reports of QEMU's own trackers and of
other tools' users and were not reproduced by us. A distribution may have mended its build without a new number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Defect", "MINIMUM_LIBVIRT", "MINIMUM_QEMU", "defects", "parse"]

MINIMUM_QEMU = (7, 2, 0)
MINIMUM_LIBVIRT = (9, 0, 0)

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Defect:
    """Versions `first <= v < end`. `iothread`: only domains with an iothread are in danger. `mirror`: continuous
    capture would meet it, and is not begun there. `others`: what other tools do meets it while that runs."""

    first: Version
    end: Version
    iothread: bool
    what: str
    remedy: str
    mirror: bool = False
    others: bool = False


_DEFECTS = (
    Defect(
        (7, 2), (7, 3), True,
        "this QEMU's own NBD server aborts the guest when a reader disconnects from a disk with an iothread. Rewind "
        "never uses that server; pull-mode backups (virsh backup-begin, virtnbdbackup and others) do",
        "let other tools use push mode for this domain, or remove the iothread",
    ),
    # Not refused: such a backup aborts the guest without us as well, at its end. Everything else that other tools do
    # was tried under the tap and is harmless.
    Defect(
        (7, 2), (8, 1), True,
        "a pull-mode backup by another tool (virsh backup-begin, virtnbdbackup and others) aborts the guest as soon as "
        "it begins, while every write of a disk with an iothread is recorded (continuous capture)",
        "let other tools use push mode for this domain, or remove the iothread",
        others=True,
    ),
    Defect(
        (8, 1), (9, 0), True,
        "guest I/O is reported to hang for good when a block job drains a disk with an iothread (8.1, 8.2)",
        "remove the iothread from the disk",
        mirror=True,
    ),
    Defect(
        (10, 0), (10, 1), True,
        "a guest that writes to a disk with an iothread may wait for ever after any pause (virsh suspend and resume). "
        "Rewind would pause it for its points, so it takes none of such disks while the guest runs",
        "remove the iothread from the disk",
    ),
    Defect(
        (10, 0), (10, 1), True,
        "a backup job with QEMU's default workers (virsh backup-begin in push mode) kills the guest when it is "
        "suspended or reset meanwhile",
        "do not suspend or reset this domain while another tool backs it up, or remove the iothread",
    ),
    Defect(
        (10, 1), (10, 3), False,
        "a write-blocking mirror is reported to abort the guest on short zero writes (10.1, 10.2). Rewind's points and "
        "reverts use no mirror; virsh blockcopy and storage migration may. Continuous capture would, so this domain "
        "gets points by dirty bitmaps instead",
        "avoid write-blocking copies of this domain's disks on this build",
        mirror=True,
    ),
)  # fmt: skip


def defects(version: Version, iothread: bool) -> Iterator[Defect]:
    """Those that a domain with or without an iothread meets on this version."""
    for one in _DEFECTS:
        if one.first <= version < one.end and (iothread or not one.iothread):
            yield one


def parse(text: str) -> Version:
    """`7.2.22` → (7, 2, 22); what cannot be read is (0,)."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers) or (0,)
