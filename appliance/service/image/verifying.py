"""A point is proven by booting it: an image is built for a machine of software, booted on throw-away layers over the
point, and what it shows is kept beside the point.

    machine ─► plan, build ─► view ─► rehearse ─► judge ─► evidence

Nothing of the domain is touched, and no libvirt is asked: it may run meanwhile, or be gone. The machine is what the
target says, or the hardware that the domain had at that instant.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from appliance.errors import BadInventory, Interrupted, NoSpace, ToolFailed
from appliance.model import DiskPoint, Point
from appliance.restore.export import ViewServer
from appliance.restore.rehearsal import Outcome, rehearse
from appliance.restore.stage import Layer, Stage, guest_user
from appliance.service.elsewhere import choose
from appliance.service.image import drivers, evidence, making, targets
from appliance.service.instant import resolve
from appliance.service.session import Progress, Session, silent
from images import hardware
from images.build import build_image
from images.drivers.settle import consoles
from images.media.base import check_command_line
from images.model import Firmware, Inventory, Plan
from images.template.settings import settings_for
from images.verify.judge import Verdict, Waiting, judge, printable
from images.verify.machine import Machine, machine_for
from images.verify.manifest import Manifest, heard, lying
from images.verify.report import reporter

__all__ = ["MEMORY", "TIMEOUT", "Verified", "verify"]

log = logging.getLogger(__name__)

MEMORY, TIMEOUT = 1 << 30, 600.0
_ANY_MACHINE = "qemu-virtio-bios"
_MEDIUM = "iso"
# Of differences and lines of the console that a document holds.
_MOST = 200


@dataclass(frozen=True, slots=True)
class Verified:
    """`mark` names the evidence. `target` is what the machine stood for, `command_line` what was added for the test,
    `seconds` of the boot; `last_words` are those of the console."""

    domain: str
    point: str
    time: datetime
    target: str
    verdict: Verdict
    mark: evidence.Mark
    manifest: Mapping[str, Any]
    machine: str
    accelerator: str
    seconds: float
    ended: str
    command_line: tuple[str, ...]
    warnings: tuple[str, ...]
    last_words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is booted, and what has to come of it."""

    plan: Plan
    machine: Machine
    medium: Path
    point: Manifest
    added: tuple[str, ...]
    template: str


def verify(
    session: Session, domain: str, when: str, target: str = "", *, timeout: float = TIMEOUT, memory: int = MEMORY,
    template: str = "", progress: Progress = silent, stopped: Callable[[], bool] = lambda: False,
) -> Verified:  # fmt: skip
    """Boot DOMAIN's point as a test. `timeout` in seconds bounds the boot, `memory` in bytes the machine; it is broken
    off when `stopped` says so.

    Whether it came up is in the verdict. Nobody types a passphrase in a test: an encrypted root is refused as
    GuestUnreadable. Raises Interrupted when it was broken off, NotSupported (a target that QEMU cannot stand for),
    DriversMissing and what `making.build` raises, ImageError and NoSpace when the host has not the room: nothing is
    kept then.
    """
    point = resolve(session, domain, when)
    # gc waits as long as the point is read.
    with session.repository.session(f"test of {point.domain}"):
        return _verify(session, point, target, timeout, memory, template, progress, stopped)


def _verify(
    session: Session, point: Point, target: str, timeout: float, memory: int, template: str, progress: Progress,
    stopped: Callable[[], bool],
) -> Verified:  # fmt: skip
    disks = choose(point, ())
    folder = Path(tempfile.mkdtemp(prefix="verify-", dir=session.home.path / "run"))
    try:
        progress(0, 0, "building the image")
        made = _prepare(session, point, disks, target, folder, template)
        progress(0, 0, f"booting {point.id}")
        outcome = _boot(session, made, disks, folder, timeout, memory, stopped)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _keep(session, point, made, outcome)


# --- the machine and its image --------------------------------------------------------------------------------------


def _prepare(
    session: Session, point: Point, disks: Sequence[DiskPoint], target: str, folder: Path, template: str
) -> _Prepared:
    inventory = _inventory(session, point, target)
    machine = machine_for(inventory, [one.disk for one in disks])
    inventory = inventory.model_copy(update={"console": machine.console})
    with making.prepared(session, point.domain_uuid, point.id, target, template, (), None, inventory) as ready:
        plan, added = _on_the_console(ready.planned.plan, machine.console)
        settings = settings_for(plan)
        settings = replace(settings, run={**settings.run, **reporter(machine.report)}, linger_seconds=5)
        with _in_the_home():
            built = build_image(
                plan, ready.guest.tree, ready.template, media=[_MEDIUM], folder=folder / "image", settings=settings,
                driver_store=drivers.reader(ready.store, plan.client.release),
            )  # fmt: skip
        return _Prepared(plan, machine, built.files[_MEDIUM], lying(ready.guest.tree), added, ready.template.id)


@contextmanager
def _in_the_home() -> Iterator[None]:
    """A hint that is true here, where nobody has named the folder nor could name another one."""
    try:
        yield
    except NoSpace as error:
        error.hint = "make room there; nothing was written"
        raise


def _inventory(session: Session, point: Point, target: str) -> Inventory:
    """The target's, the domain's own, or a usual one for a domain whose hardware is not known."""
    if target:
        return targets.find(session, target).inventory
    try:
        return hardware.from_xml(point.xml, target="own-hardware")
    except (BadInventory, ToolFailed) as error:
        log.info("the hardware of %s is not known: %s", point.domain, error)
        return hardware.profile(_ANY_MACHINE)


def _on_the_console(plan: Plan, console: str) -> tuple[Plan, tuple[str, ...]]:
    """The plan with words that let everything be seen, and these words: kernel and system speak on the serial line,
    and a kernel that panics does not wait."""
    added = ["ignore_loglevel", "panic=-1", "systemd.show_status=1"]
    if "tty0" not in consoles(plan.command_line):
        added.append("console=tty0")  # for the screen
    if consoles(" ".join([plan.command_line, *added]))[-1:] != [console]:
        added.append(f"console={console},115200")  # the last one is the system's
    line = " ".join([plan.command_line, *added])
    check_command_line(line)
    return replace(plan, command_line=line), tuple(added)


# --- the boot -------------------------------------------------------------------------------------------------------


def _boot(
    session: Session, made: _Prepared, disks: Sequence[DiskPoint], folder: Path, timeout: float, memory: int,
    stopped: Callable[[], bool],
) -> Outcome:  # fmt: skip
    uid, gid, _name = guest_user()
    # QEMU's user passes through to the socket and can read nothing else here.
    folder.chmod(0o711)
    stage_folder = folder / "stage"
    stage_folder.mkdir(mode=0o700)
    with ExitStack() as stack:
        server = stack.enter_context(
            ViewServer(
                folder, session.spec, {one.disk: one.map for one in disks}, owner=(uid, gid),
                cache=session.settings.view_cache, log=session.home.log / "verify.log",
            )  # fmt: skip
        )
        layers = [Layer(server.socket, one.disk, one.size) for one in disks]
        machine = made.machine
        stage = Stage(
            machine.machine, machine.words, layers, made.medium, memory, uefi=machine.firmware is Firmware.UEFI,
            secure_boot=machine.secure_boot, accelerator=session.settings.accelerator,
        )  # fmt: skip
        waiting = Waiting()

        def over(console: bytes, report: bytes, now: float) -> str:
            return "it was broken off" if stopped() else waiting.over(console, report, now)

        outcome = rehearse(stage, stage_folder, timeout=timeout, over=over)
    if stopped():
        raise Interrupted(reason="a test boot was broken off")
    return outcome


# --- the verdict ----------------------------------------------------------------------------------------------------


def _keep(session: Session, point: Point, made: _Prepared, outcome: Outcome) -> Verified:
    told = heard(outcome.report)
    verdict = judge(outcome.console, told, made.point, made.plan.client.release, outcome.ended)
    now = datetime.now(UTC).replace(microsecond=0)
    words = printable(outcome.console, 20)
    document = {
        "version": 1, "point": point.id, "domain": point.domain, "uuid": point.domain_uuid, "time": now.isoformat(),
        "booted": verdict.booted, "reasons": verdict.reasons, "kernels": verdict.kernels, "failed": verdict.failed,
        "differences": verdict.differences[:_MOST], "ended": outcome.ended, "seconds": round(outcome.seconds, 3),
        "written_bytes": outcome.written, "target": made.plan.inventory.name, "machine": made.machine.machine,
        "firmware": made.machine.firmware.value, "accelerator": outcome.accelerator, "notes": made.machine.notes,
        "command_line": made.plan.command_line, "added": made.added, "template": made.template,
        "warnings": made.plan.warnings, "system": told.document(), "expected": made.point.document(),
    }  # fmt: skip
    files = {"console.log": outcome.console, "report.txt": outcome.report, "screen.png": outcome.screenshot}
    mark = evidence.put(session, point.id, now, verdict.booted, document, files)
    return Verified(
        point.domain, point.id, point.time, made.plan.inventory.name, verdict, mark, told.document(),
        made.machine.machine, outcome.accelerator, outcome.seconds, outcome.ended, made.added,
        (*made.machine.notes, *made.plan.warnings), tuple(words),
    )  # fmt: skip
