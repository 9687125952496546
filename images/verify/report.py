"""What an image lays into /run so that the system tells of itself: a unit of systemd, and the script that it runs.

    /run/rewind/report                                       report.sh
    /run/systemd/system/rewind-report.service                runs it
    /run/systemd/system/multi-user.target.d/rewind.conf      has it started

Nothing is written to the client's disk, and after the next start nothing of it is there. A client without systemd does
not read it: its console is all that is seen then.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

__all__ = ["reporter", "script"]

_UNITS = "systemd/system"
_UNIT = """[Unit]
Description=Tell what this system is, because this start of it is a test

[Service]
ExecStart=/bin/sh /run/rewind/report /dev/{port}
"""
# Not a link in multi-user.target.wants: what is laid into /run are files.
_WANTED = "[Unit]\nWants=rewind-report.service\n"


def script() -> str:
    """The text of `report.sh`."""
    return (files("images.verify") / "report.sh").read_text(encoding="utf-8")


def reporter(port: str) -> Mapping[str, bytes]:
    """Files for /run by relative path (`Settings.run`); `port` is a serial line as the kernel names it (`ttyS3`)."""
    return {
        "rewind/report": script().encode(),
        f"{_UNITS}/rewind-report.service": _UNIT.format(port=port).encode(),
        f"{_UNITS}/multi-user.target.d/rewind.conf": _WANTED.encode(),
    }
