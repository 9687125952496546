"""How far a domain or machine that was brought up from a point is, in one line: for `image list` and `status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.cli import records
from appliance.cli.command import Context
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.image.starting import Running
    from appliance.service.image.streaming import Streamed

__all__ = ["emit_running", "emit_streamed"]

# A machine that lives is heard every few seconds.
_SILENT = 30.0


def emit_running(context: Context, one: Running) -> None:
    """One domain's line."""
    record = records.ImageRunning(
        one.name, one.point, one.phase, one.done_bytes, one.total_bytes, one.left, one.error
    )  # fmt: skip
    words = {
        "pulling": f"filling {', '.join(one.left)}: {format_size(one.done_bytes)} of {format_size(one.total_bytes)}",
        "off": f"off, and still needs the repository for {', '.join(one.left)}",
        "done": "done: its disks are its own",
        "stopped": "nobody fills its disks any more: `rewind image resume` goes on",
        "gone": f"gone: there is no such domain any more; `rewind image forget {one.name}` ends what is kept for it",
    }
    error = f" ({one.error})" if one.error and one.phase != "gone" else ""
    context.output.emit(record, f"{one.name:20} {words.get(one.phase, one.phase)}{error}")


def emit_streamed(context: Context, one: Streamed) -> None:
    """One session's line."""
    record = records.ImageStreamed(
        one.name, one.point, one.target, one.mode, one.phase, one.done_bytes, one.total_bytes, one.left_bytes, one.rate,
        one.answers, one.silent_seconds, one.read_bytes, one.written_bytes, one.boots, one.service_seconds,
        one.service_read_bytes, one.left, one.error,
    )  # fmt: skip
    far = f"{', '.join(one.left)}: {format_size(one.done_bytes)} of {format_size(one.total_bytes)}"
    far += f", {format_size(one.left_bytes)} left"
    far += f" at {format_size(one.rate)}/s" if one.rate else ""
    words = {
        "waiting": "served, and no machine has come yet",
        "booting": f"its machine boots, or runs from here; {format_size(one.read_bytes)} were read",
        "pulling": f"filling {far}",
        "copying": f"copying {far}",
        "done": "done: the machine's disks are its own",
        "stopped": "nobody serves it any more: `rewind image resume` goes on",
    }
    remarks = [one.error] if one.error else []
    if one.phase not in ("done", "stopped"):
        remarks += [] if one.answers else ["no machine is answered now"]
        if one.silent_seconds is not None and one.silent_seconds >= _SILENT:
            remarks.append(f"nothing was heard of its machine for {format_duration(one.silent_seconds)}")
    remark = f" ({'; '.join(remarks)})" if remarks else ""
    context.output.emit(record, f"{one.name:20} {words[one.phase]}{remark}")
