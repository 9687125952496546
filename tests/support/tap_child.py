"""Put a tap on or take it off, guarded, and be killed on the way: python -m tests.support.tap_child JSON.

`at` is the number of a QMP command, or one by name: `qom-set 2` is the second one of that name. It dies right after it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from appliance.hypervisor import connect
from appliance.hypervisor.graph import tap
from appliance.hypervisor.guard import guarding


class Fatal:
    """A monitor that kills us; polling for jobs counts as nothing."""

    def __init__(self, monitor, at):
        self.real = monitor
        self.domain, self.storage_daemon = monitor.domain, monitor.storage_daemon
        name, _, number = at.rpartition(" ")
        self.name, self.left = name, int(number)

    def execute(self, command, /, **arguments):
        answer = self.real.execute(command, **arguments)
        self.left -= command == self.name or (not self.name and command != "query-jobs")
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    def execute_with_fd(self, command, fd, /, **arguments):
        return self.real.execute_with_fd(command, fd, **arguments)


def main():
    order = json.loads(sys.argv[1])
    domain = connect(order["uri"]).domain(order["name"])
    monitor = Fatal(domain.monitor(), order["at"])
    disks = domain.disks()
    with guarding(domain.uri, domain.uuid, Path(order["lock"])) as guard:
        guard.await_ready()
        if order["verb"] == "attach":
            tap.attach(monitor, disks, Path(order["socket"]), before=guard.pausing, after=guard.resumed)
        else:
            tap.detach(monitor, disks, before=guard.pausing, after=guard.resumed)


if __name__ == "__main__":
    main()
