"""A backend that misbehaves on request: what a store, a network or a power cut can do to a caller.

For tests and for `./dev soak`; normal code, so that it cannot drift from the backends it stands in front of.

    fault           before the call      the call         after the call
    REFUSE          Temporary
    NO_SPACE, DENY  that error
    LOSE                                 takes effect     Temporary: the answer was lost on the way
    REPEAT                               sent twice       the answer of the second
    TEAR                                 half the data    Temporary; a listing breaks off in the middle
    LIE                                  half the data
    FLIP                                 one bit wrong
    CRASH_BEFORE    the process dies
    CRASH_AFTER                          takes effect     the process dies
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NoReturn

from appliance.errors import NoSpace, PermissionDenied, Temporary
from appliance.store.backend.base import Backend, Buffer, ObjectInfo
from appliance.store.backend.wrap import Wrapper

__all__ = ["Crashed", "Fault", "Faulty", "Operation", "Plan", "at"]


class Fault(Enum):
    REFUSE = auto()
    NO_SPACE = auto()
    DENY = auto()
    LOSE = auto()
    REPEAT = auto()
    TEAR = auto()
    LIE = auto()
    FLIP = auto()
    CRASH_BEFORE = auto()
    CRASH_AFTER = auto()


@dataclass(frozen=True, slots=True)
class Operation:
    """`number` counts all calls from 1; `kind` is the method's name; `name` the object or prefix."""

    number: int
    kind: str
    name: str


Plan = Callable[[Operation], Fault | None]


class Crashed(BaseException):
    """Stands for the death of the process. No `except Exception` may save it, and every later call raises it too."""


def at(number: int, fault: Fault) -> Plan:
    """The plan of one fault at the `number`-th call."""
    return lambda operation: fault if operation.number == number else None


class Faulty(Wrapper):
    """Asks `plan` before each call what goes wrong; `seconds` is how long every call takes besides.

    `crash` ends the process (`lambda: os._exit(9)`); without it Crashed is raised, now and at every later call.
    Thread-safe if the plan is. `operations` holds all calls so far.
    """

    def __init__(
        self, inner: Backend, plan: Plan, *, seconds: float = 0.0, crash: Callable[[], object] | None = None
    ) -> None:
        super().__init__(inner)
        self.operations: list[Operation] = []
        self._plan = plan
        self._seconds = seconds
        self._crash_hook = crash
        self._crashed = False
        self._lock = threading.Lock()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        fault = self._begin("get", name)
        data = self.inner.get(name, offset, length)
        self._end(fault, name)
        return _damaged(data, fault)

    def put(self, name: str, data: Buffer) -> None:
        fault = self._begin("put", name)
        self.inner.put(name, _damaged(bytes(data), fault))
        if fault is Fault.REPEAT:
            self.inner.put(name, data)
        self._end(fault, name)

    def delete(self, name: str) -> None:
        fault = self._begin("delete", name)
        self.inner.delete(name)
        if fault is Fault.REPEAT:
            self.inner.delete(name)
        self._end(fault, name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        fault = self._begin("list", prefix)
        found = [*self.inner.list(prefix)]
        yield from found[: len(found) // 2] if fault in {Fault.TEAR, Fault.LIE} else found
        self._end(fault, prefix)

    def stat(self, name: str) -> ObjectInfo:
        fault = self._begin("stat", name)
        info = self.inner.stat(name)
        self._end(fault, name)
        return info

    def _begin(self, kind: str, name: str) -> Fault | None:
        with self._lock:
            operation = Operation(len(self.operations) + 1, kind, name)
            self.operations.append(operation)
            if self._crashed:
                raise Crashed(operation)
        if self._seconds:
            time.sleep(self._seconds)
        fault = self._plan(operation)
        if fault is Fault.REFUSE:
            raise Temporary(url=self.url, name=name, reason="refused on request")
        if fault is Fault.NO_SPACE:
            raise NoSpace(url=self.url, name=name)
        if fault is Fault.DENY:
            raise PermissionDenied(url=self.url, name=name, reason="denied on request")
        if fault is Fault.CRASH_BEFORE:
            self._crash(operation)
        return fault

    def _end(self, fault: Fault | None, name: str) -> None:
        if fault is Fault.CRASH_AFTER:
            self._crash(self.operations[-1])
        if fault in {Fault.LOSE, Fault.TEAR}:
            raise Temporary(url=self.url, name=name, reason="answer lost on request")

    def _crash(self, operation: Operation) -> NoReturn:
        with self._lock:
            self._crashed = True
        if self._crash_hook:
            self._crash_hook()
        raise Crashed(operation)


def _damaged(data: bytes, fault: Fault | None) -> bytes:
    if fault in {Fault.TEAR, Fault.LIE}:
        return data[: len(data) // 2]
    if fault is Fault.FLIP and data:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return data
