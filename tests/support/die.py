"""Take a point and be killed right after the N-th QMP command: `python -m tests.support.die FOLDER URI NAME N [RATE]`.

N may also be `frozen` (killed when the guest's file systems are) or `paused` (and the guest stands still, too).
Prints the number of commands when it gets through.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from appliance.capture import work
from tests.support.protect import Protected

# What is done first in that state.
_STEPS = {"frozen": "_freeze_live", "paused": "_freeze"}


def main(folder, uri, name, number, rate="0"):
    if uri.startswith("qmp:"):
        from appliance.hypervisor import qmp as driver

        kind = driver.Connection
    else:
        from appliance.hypervisor import libvirt as driver

        kind = driver._LibvirtMonitor
    if number in _STEPS:
        setattr(work.Work, _STEPS[number], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        number = "0"
    real, count = kind._execute, 0

    def execute(self, command, fd, arguments):
        nonlocal count
        answer = real(self, command, fd, arguments)
        # Polling takes any number of commands; it counts as one.
        count += command not in ("query-jobs", "query-block-jobs")
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    kind._execute = execute
    with Protected(Path(folder), uri, name, rate_limit=int(rate)) as world:
        world.point()
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
