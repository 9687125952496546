"""What the name of a domain means where several domains had it one after the other.

A domain is its UUID; a name may go to another one after it was lost. Then the name means the domain that is protected
under it. For what only reads, one that has points comes before one that has none yet: who asks for the points of `web`
in the worst hour wants those that there are. Where nothing decides, nobody guesses: the UUIDs are listed. A UUID always
means itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from shlex import quote
from typing import TYPE_CHECKING

from appliance.errors import ConfigError, ConnectError, DomainNotFound, HypervisorError, NotProtected, RewindError

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.hypervisor.base import Domain
    from appliance.service.session import Session

__all__ = ["earlier", "found", "holder", "lost", "meant", "not_protected", "uuid_of"]


def uuid_of(session: Session, name: str, *, reading: bool = False) -> tuple[str, str]:
    """(UUID, name) of a domain that is protected or has points. The hypervisor is asked for hints only: history must be
    readable when libvirt is down or the domain is gone. Only with `reading` it may be another than the one protected.

    Raises NotProtected, and ConfigError for a name of several domains that have points and none of which is protected.
    """
    record = session.record(name)
    if record is not None and (not reading or name == record.uuid):
        return record.uuid, record.domain
    known = dict(session.catalogue.domains(name))
    if record is not None:
        others = _counted(session, [uuid for uuid in known if uuid != record.uuid])
        if not others:
            return record.uuid, record.domain
        return _before_or_now(session, name, record, known, others)
    if len(known) > 1:
        # What was forgotten meanwhile decides nothing.
        known = {uuid: known[uuid] for uuid in _counted(session, list(known))}
    if not known:
        raise NotProtected(domain=name, hint=meant(session, name))
    if len(known) > 1:
        raise _several(name, _counted(session, list(known)))
    return next(iter(known.items()))


def _before_or_now(
    session: Session, name: str, record: Protection, known: dict[str, str], others: dict[str, int]
) -> tuple[str, str]:
    """For what only reads, and always told which it is."""
    if record.uuid in session.catalogue.count():
        session.mention(f"another domain was called {name!r} before, and has points as well: {_listed(others)}")
        return record.uuid, record.domain
    if len(others) > 1:
        raise _several(name, others)
    uuid = next(iter(others))
    session.mention(f"the {name!r} of now has no points yet: these are of the one before it, {uuid}")
    return uuid, known[uuid]


def earlier(session: Session, name: str, uuid: str) -> str:
    """The other domains of that name that have points, in words; empty when there are none."""
    return _listed(_counted(session, [one for one, _name in session.catalogue.domains(name) if one != uuid]))


def found(session: Session, name: str) -> Domain:
    """The hypervisor's domain. Raises DomainNotFound, with a name that looks like it where there is one."""
    hypervisor = session.hypervisor()
    try:
        return hypervisor.domain(name)
    except DomainNotFound as gone:
        raise DomainNotFound(**gone.fields, hint=_like(session, name, hypervisor.domains())) from None


def not_protected(session: Session, name: str) -> RewindError:
    """A domain that does not exist is told as that: `not protected` would send the reader the wrong way."""
    hint = ""
    try:
        uuid_of(session, name)
    except NotProtected as error:
        hint = error.hint
        try:
            found(session, name)
        except DomainNotFound as gone:
            return gone
        except ConnectError:
            pass
    except ConfigError:
        pass  # several had the name, and have points; it is protected in none of them
    return NotProtected(domain=name, hint=hint)


def _like(session: Session, name: str, others: Iterable[str] = ()) -> str:
    """A known name that looks like it, as a question; empty where there is none."""
    from difflib import get_close_matches

    from appliance.capture import protection

    names = {one.domain for one in protection.all_records(session.home)} | set(others)
    with suppress(RewindError):  # a repository that is not there is no answer to a name that was mistyped
        names |= set(session.catalogue.names())
    close = get_close_matches(name, sorted(names - {name}), 1)
    return f"did you mean {close[0]!r}?" if close else ""


def _counted(session: Session, uuids: list[str]) -> dict[str, int]:
    """Those that have points, with their number."""
    count = session.catalogue.count() if uuids else {}
    return {uuid: count[uuid] for uuid in uuids if uuid in count}


def _listed(found: dict[str, int]) -> str:
    return ", ".join(f"`rewind points {uuid}` ({number})" for uuid, number in found.items())


def _several(name: str, found: dict[str, int]) -> ConfigError:
    """Newest last, as the catalogue has them."""
    listed = ", ".join(f"{uuid} ({number} points)" for uuid, number in found.items())
    newest = list(found)[-1]
    return ConfigError(
        reason=f"{name!r} was the name of {len(found)} domains: {listed}",
        hint=f"name the one that is meant by its UUID; the newest: `rewind points {newest}`",
    )


def meant(session: Session, name: str) -> str:
    """A known name that looks like it, or that there is no such domain; empty for the usual hint, to protect it."""
    if close := _like(session, name):
        return close
    try:
        session.hypervisor().domain(name)
    except DomainNotFound:
        return f"there is no domain {name!r}: `rewind status --all` lists those that there are"
    except HypervisorError:
        pass
    return ""


# --- a protected domain that the hypervisor does not know any more ----------------------------------------------------


def holder(session: Session, record: Protection) -> Domain | None:
    """The domain that has the name of a protected one that is gone; None while that one is there, or nobody has it.
    Raises ConnectError."""
    hypervisor = session.hypervisor(record.uri)
    try:
        hypervisor.domain(record.uuid)
        return None
    except DomainNotFound:
        pass
    try:
        return hypervisor.domain(record.domain)
    except DomainNotFound:
        return None


def lost(session: Session, record: Protection) -> DomainNotFound:
    """The error for a protected domain that is gone: by its name, and with the way on."""
    name, other = record.domain, holder(session, record)
    if other is None:
        again = f"`rewind restore {quote(name)} --at latest --into FOLDER --name {quote(name)}`"
        hint = f"{again} brings it back; its points stay"
        return DomainNotFound(domain=name, uri=record.uri, hint=hint)
    hint = (
        f"{name} is another domain now, {other.uuid}: `rewind protect {quote(name)}` protects that one instead, and"
        f" `rewind points {record.uuid}` lists the points of the lost one"
    )
    return DomainNotFound(domain=f"{name} ({record.uuid})", uri=record.uri, hint=hint)
