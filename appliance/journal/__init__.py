"""Reads what `filters/journal` writes: the ordered writes of all disks of a domain. The format is in FORMAT.md.

    Journal      a spool folder: records from any number, marks, sessions, holes, `verify`
    latest       the newest content of every chunk touched between two numbers;  pieces: of one range
    Segment      one file of it
    Control      status, marks, sealing and forgetting, asked of the process that writes
"""

from appliance.journal.control import Control, Mark, State
from appliance.journal.journal import Journal, Part, Problem, Session, forget
from appliance.journal.latest import Piece, Touched, latest, pieces
from appliance.journal.layout import Disk, Entry, Footer, Header, Kind, Record
from appliance.journal.segment import Segment

__all__ = [
    "Journal", "latest", "pieces", "Control", "Segment", "Record", "Kind", "Part", "Session", "Mark", "State", "Piece",
    "Touched", "Problem", "Disk", "Entry", "Header", "Footer", "forget",
]  # fmt: skip
