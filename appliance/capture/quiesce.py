"""Guest file systems frozen around the instant of a point, and thawed whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from appliance.errors import AgentUnavailable
from appliance.hypervisor.base import Domain, DomainState
from appliance.hypervisor.guard import Guard
from appliance.model import Consistency

__all__ = ["Level", "frozen"]


@dataclass(frozen=True, slots=True)
class Level:
    """How good the instant is, and what to tell about it."""

    consistency: Consistency
    notes: tuple[str, ...] = ()


@contextmanager
def frozen(domain: Domain, mode: str, timeout: float, guard: Guard) -> Iterator[Level]:
    """Freeze for the block. `mode` is `auto` (without an agent: not), `require` or `never`.

    `guard` thaws if we die meanwhile. Raises AgentUnavailable for `require`; nothing is frozen then.
    """
    if mode == "never" or domain.state() is not DomainState.RUNNING:
        if mode == "require":
            raise AgentUnavailable(domain=domain.name, reason="the guest does not run")
        yield Level(Consistency.CRASH)
        return
    guard.freezing()
    try:
        count = domain.freeze(timeout)
    except AgentUnavailable:
        guard.thawed()
        if mode == "require":
            raise
        yield Level(Consistency.CRASH)
        return
    try:
        if count:
            yield Level(Consistency.FILESYSTEM, (f"{count} file systems were frozen",))
        else:
            yield Level(Consistency.CRASH, ("the guest agent had no file system to freeze",))
    finally:
        domain.thaw(timeout)
        guard.thawed()
