"""Every line that `--json` can print, one dataclass each: the machine's side of the command line.

`JSON.md` documents them field by field, and a test compares the two. Fields are only added, never renamed or removed;
a reader ignores those it does not know. That they repeat what services return is on purpose: that may change. Sizes are
bytes, durations seconds, times ISO 8601 in UTC.

Each area's are loaded when one of them is first used: making fifty classes takes a fifth of the time in which a verb
begins, and it needs a few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from appliance.cli.records.base import DiskBytes, Error, ExitCode, Progress, Record, to_json

if TYPE_CHECKING:
    from appliance.cli.records.history import (
        Branch,
        Bucket,
        CaptureEvent,
        Diff,
        DiffExtent,
        Gap,
        Lane,
        Mark,
        Point,
        PointsSummary,
        Span,
        Timeline,
    )
    from appliance.cli.records.image import (
        ImageBuilt,
        ImageDrivers,
        ImageEvidence,
        ImageFile,
        ImagePlan,
        ImageProfile,
        ImageReader,
        ImageRemoved,
        ImageRunning,
        ImageServed,
        ImageSettled,
        ImageStarted,
        ImageStep,
        ImageStreamed,
        ImageTarget,
        ImageTemplate,
        ImageVerified,
        ImageWindowsPlan,
    )
    from appliance.cli.records.protection import (
        Capture,
        DaemonEvent,
        DoctorCheck,
        DoctorSummary,
        DomainStatus,
        Initialised,
        LastGap,
        Paused,
        Protected,
        Status,
        Unprotected,
    )
    from appliance.cli.records.recovery import Export, Restored, Reverted, RevertPlan
    from appliance.cli.records.upkeep import CheckSummary, Forget, ForgetSummary, Gc, Key, Problem

__all__ = [
    "Branch", "Bucket", "Capture", "CaptureEvent", "CheckSummary", "DaemonEvent", "Diff", "DiffExtent", "DiskBytes",
    "DoctorCheck", "DoctorSummary", "DomainStatus", "Error", "ExitCode", "Export", "Forget", "ForgetSummary", "Gap",
    "Gc", "ImageBuilt", "ImageDrivers", "ImageEvidence", "ImageFile", "ImagePlan", "ImageProfile", "ImageReader",
    "ImageRemoved", "ImageRunning", "ImageServed", "ImageSettled", "ImageStarted", "ImageStep", "ImageStreamed",
    "ImageTarget", "ImageTemplate", "ImageVerified", "ImageWindowsPlan", "Initialised", "Key", "Lane", "LastGap",
    "Mark", "Paused", "Point", "PointsSummary", "Problem", "Progress", "Protected", "Record", "Restored", "RevertPlan",
    "Reverted", "Span", "Status", "Timeline", "Unprotected", "to_json",
]  # fmt: skip

_AREAS = {
    "history": (
        "Branch", "Bucket", "CaptureEvent", "Diff", "DiffExtent", "Gap", "Lane", "Mark", "Point", "PointsSummary",
        "Span", "Timeline",
    ),
    "image": (
        "ImageBuilt", "ImageDrivers", "ImageEvidence", "ImageFile", "ImagePlan", "ImageProfile", "ImageReader",
        "ImageRemoved", "ImageRunning", "ImageServed", "ImageSettled", "ImageStarted", "ImageStep", "ImageStreamed",
        "ImageTarget", "ImageTemplate", "ImageVerified", "ImageWindowsPlan",
    ),
    "protection": (
        "Capture", "DaemonEvent", "DoctorCheck", "DoctorSummary", "DomainStatus", "Initialised", "LastGap", "Paused",
        "Protected", "Status", "Unprotected",
    ),
    "recovery": ("Export", "Restored", "Reverted", "RevertPlan"),
    "upkeep": ("CheckSummary", "Forget", "ForgetSummary", "Gc", "Key", "Problem"),
}  # fmt: skip
_HOMES = {name: area for area, names in _AREAS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
