"""A domain that was started with `--settle` loses its boot medium, once its own disk is known to start by itself.

What its steps came to is read from its disk, where it has put it: the guest has no other way to us. The reader is
that of points, a caged child; nothing of the guest is mounted or run.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ConfigError, DomainNotFound, ImageError
from appliance.hypervisor.base import Changes, Domain, DomainState
from appliance.restore import hydrations
from appliance.restore.newhardware import has_drive, has_medium, without_medium
from appliance.service.image import readers
from appliance.service.image.starting import running
from appliance.service.session import Session
from images.guest import open_guest
from images.guest.texts import printable
from images.media import iso
from images.settle.choice import REPORTS

__all__ = ["Settled", "StepDone", "outcomes", "settle"]

_MOST = 1 << 16
_FORMAT = "qcow2"
# As the builder of images names the CD that `starting` asks for.
_MEDIUM = f"rewind{iso.MEDIUM.suffix}"
_OUTCOMES = {"done": "done", "nothing to do": "nothing", "left as it was": "left"}


@dataclass(frozen=True, slots=True)
class StepDone:
    """`outcome`: `done`, `nothing` (there was nothing to do), `left` (as it was) or `failed`; `said`: its sentences."""

    name: str
    outcome: str
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """`reason` why its boot medium stays; empty when all was done, its disk starts by itself, and its definition has no
    boot medium any more. `again`: another start from the medium may change that. `medium`: the file that was attached
    before, and is still there; None for a domain that had none. `last`: the report's path in the guest, when no start
    from its medium makes another one as long as it is there."""

    name: str
    reason: str
    steps: tuple[StepDone, ...]
    medium: Path | None
    again: bool = True
    last: str = ""

    @property
    def alone(self) -> bool:
        return not self.reason


def settle(session: Session, name: str, keys: Sequence[bytes] = ()) -> Settled:
    """Read what became of the domain `name`, and take its boot medium away if it can do without. `keys` are passphrases
    for LUKS. May be repeated.

    Raises ConfigError for a name that nobody brought up, one that was started without `--settle`, and one that runs or
    still reads from the repository; DomainNotFound for one that is gone; ImageError when it has not settled yet;
    GuestUnreadable when its disk cannot be read; NotSupported when its definition has no such disk; HypervisorError.
    Its definition is as before then.
    """
    found = running(session, name)
    order = hydrations.load(session.home, name)
    assert order is not None, "it was just read"
    if not order.settles:
        hint = "`rewind image start --settle` has a guest make its disk start by itself"
        raise ConfigError(reason=f"domain {name!r} was not started with --settle", hint=hint)
    if found.phase == "gone":
        raise DomainNotFound(domain=name, uri=order.uri, hint=f"`rewind image forget {name}` ends what is kept for it")
    if found.phase != "done":
        reason = f"domain {name!r} still reads {', '.join(found.left) or 'its disks'} from the repository"
        raise ConfigError(reason=reason, hint="wait until `rewind image list` says done")
    domain = session.hypervisor_at(order.uri).domain(order.uuid)
    if domain.state() is not DomainState.SHUTOFF:
        hint = f"`virsh -c {shlex.quote(order.uri)} shutdown {name}`"
        raise ConfigError(reason=f"domain {name!r} runs, so its disk cannot be read", hint=hint)
    folder = Path(order.image)
    disks = {disk: folder / f"{name}-{disk}.qcow2" for disk in order.disks}
    report, last, starts = _read(session, disks, order.settles, keys)
    steps = outcomes(report)
    reason, medium = _reason(steps), folder / _MEDIUM
    attached = medium if has_medium(domain.definition(), name, medium) else None
    if not reason and not _from_its_disk(domain, name, medium, starts):
        reason = f"which disk has its loader is not known, since its /boot lies on {', '.join(starts)}"
        return Settled(name, reason, steps, attached, again=False)
    # The image of an older release tries nothing again that was left; nor does a new one of the same point for the same
    # target, whose report has the same name.
    stays = f"{REPORTS}/{order.settles}" if reason and last else ""
    return Settled(name, reason, steps, attached, again=not stays, last=stays)


def _from_its_disk(domain: Domain, name: str, medium: Path, starts: Sequence[str]) -> bool:
    """Have it start from the disk with its loader, and without the medium. False when that is one of several, and who
    knows which has not seen to it."""
    definition = domain.definition()
    if len(starts) != 1:
        return not has_drive(definition, name, medium)
    if without_medium(definition, name, medium, starts[0]) != definition:
        assert isinstance(domain, Changes), "an order is made for a libvirt domain"
        domain.change(lambda text: without_medium(text, name, medium, starts[0]))
    return True


def _reason(steps: Sequence[StepDone]) -> str:
    """Why the boot medium is still needed: for a start that tries again, or for each one."""
    failed = [one.name for one in steps if one.outcome == "failed"]
    if failed:
        return f"{', '.join(failed)} failed in it"
    if not any(one.name == "loader" and one.outcome in ("done", "nothing") for one in steps):
        return "its disk has no loader that this firmware starts"
    return ""


def outcomes(report: str) -> tuple[StepDone, ...]:
    """The steps of a report in their order (`images/settle/run.sh`): each line is `STEP: sentence`, and a step's last
    one says what it came to. The text is the guest's: what cannot be printed is replaced."""
    said: dict[str, list[str]] = {}
    for line in report.splitlines():
        step, colon, sentence = printable(line).partition(": ")
        if colon and step not in ("identity", "settle"):
            said.setdefault(step, []).append(sentence)
    return tuple(StepDone(step, _OUTCOMES.get(lines[-1], "failed"), tuple(lines[:-1])) for step, lines in said.items())


def _read(
    session: Session, disks: Mapping[str, Path], settles: str, keys: Sequence[bytes]
) -> tuple[str, bool, tuple[str, ...]]:
    """The report; whether it is the last one; the disks that /boot lies on, where the loader is
    (`images/settle/steps/loader.sh`)."""
    scratch = Path(tempfile.mkdtemp(prefix="settled-", dir=session.home.path / "run"))
    try:
        images = {disk: f"{_FORMAT}:{path}" for disk, path in disks.items()}
        kept, accelerator = readers.folder(session), session.settings.accelerator
        with open_guest(images, scratch, keys=keys, appliances=kept, accelerator=accelerator) as guest:
            last = True
            try:
                told = guest.tree.read(f"{REPORTS}/{settles}", _MOST)
            except FileNotFoundError:  # of a start after which not all was done
                told, last = guest.tree.read(f"{REPORTS}/{settles}.failed", _MOST), False
            return told.decode(errors="replace"), last, guest.mounts.get("/boot", guest.mounts["/"]).disks
    except FileNotFoundError as error:
        reason = "the guest has not settled yet: its disk has no report of it"
        raise ImageError(reason=reason, hint="start it; its console tells each step") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
