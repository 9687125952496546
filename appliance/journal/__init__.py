"""Reads what `filters/journal` writes: the ordered writes of all disks of a domain. The format is in FORMAT.md.

    Journal      a spool folder: records from any number, marks, sessions, holes, `verify`
    latest       the newest content of every chunk touched between two numbers;  pieces: of one range
    Segment      one file of it
    bursts       when the bytes of a segment were written
    Control      status, marks, sealing and forgetting, asked of the process that writes

Names are loaded when they are first used: each verb asks for the state of a capture, few read a journal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appliance.journal.bursts import bursts
    from appliance.journal.control import Control, Mark, State
    from appliance.journal.journal import Journal, Part, Problem, Session, forget
    from appliance.journal.latest import Piece, Touched, latest, pieces
    from appliance.journal.layout import Disk, Entry, Footer, Header, Kind, Record
    from appliance.journal.segment import Segment

__all__ = [
    "Journal", "latest", "pieces", "Control", "Segment", "Record", "Kind", "Part", "Session", "Mark", "State", "Piece",
    "Touched", "Problem", "Disk", "Entry", "Header", "Footer", "bursts", "forget",
]  # fmt: skip

_MODULES = {
    "bursts": ("bursts",),
    "control": ("Control", "Mark", "State"),
    "journal": ("Journal", "Part", "Problem", "Session", "forget"),
    "latest": ("Piece", "Touched", "latest", "pieces"),
    "layout": ("Disk", "Entry", "Footer", "Header", "Kind", "Record"),
    "segment": ("Segment",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{_HOMES[name]}")
    if (home := _HOMES[name]) in _HOMES:
        globals()[home] = getattr(module, home)  # else it is the module from now on, which has the same name
    return getattr(module, name)
