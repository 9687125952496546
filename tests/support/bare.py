"""A bare QEMU in software emulation with virtio disks, its monitor, and a stand-in for what a guest does to a disk.

The firmware drives the disks for some seconds after the start, so that an iothread is really active.
"""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from pathlib import Path

from appliance.errors import DomainLost, MonitorError
from tests.support import iothreads

__all__ = ["Machine", "Qmp"]


class Qmp:
    """A monitor as `appliance.hypervisor.base.Monitor` wants it, over a unix socket."""

    domain = "bare"
    storage_daemon = False

    def __init__(self, path, timeout=20.0):
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._file = self._socket.makefile("r")
        self._file.readline()
        self._lock = threading.Lock()
        self.execute("qmp_capabilities")

    def execute(self, command, /, **arguments):
        return self._talk(command, None, arguments)

    def execute_with_fd(self, command, fd, /, **arguments):
        return self._talk(command, fd, arguments)

    def _talk(self, command, fd, arguments):
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        data = json.dumps({"execute": command, "arguments": words}).encode()
        extra = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        with self._lock:
            try:
                self._socket.sendmsg([data], extra)
                while "event" in (reply := json.loads(self._file.readline() or "null") or {}):
                    pass
            except (OSError, ValueError) as error:
                raise DomainLost(domain=self.domain, reason=str(error)) from error
        if not reply:
            raise DomainLost(domain=self.domain, reason="end of file")
        if "error" in reply:
            raise MonitorError(domain=self.domain, command=command, reason=reply["error"]["desc"])
        return reply["return"]

    def close(self):
        self._file.close()
        self._socket.close()


class Machine:
    """QEMU over `disks` (target → image, format by its suffix, `.sock`: raw behind an NBD server).

    The node of a disk is its target in capitals.
    """

    def __init__(self, folder: Path, disks, iothread=False, device_options=""):
        self.folder = folder
        self.device_options = device_options
        self.disks = dict(disks)
        self.iothread = iothread and iothreads.protected()
        self.socket = folder / "qmp.sock"
        self.other_socket = folder / "qmp2.sock"  # a monitor serves one client: this one is for whoever is tested
        self.process = None
        self.output = folder / "qemu.log"

    @staticmethod
    def device(target):
        return f"/machine/peripheral/{target}/virtio-backend"

    def start(self):
        argv = ["stdbuf", "-oL", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "64", "-nodefaults",
                "-display", "none", "-qmp", f"unix:{self.socket},server=on,wait=off",
                "-qmp", f"unix:{self.other_socket},server=on,wait=off"]  # fmt: skip
        if self.iothread:
            argv += ["-object", "iothread,id=io0"]
        for target, path in self.disks.items():
            kind = "qcow2" if path.suffix == ".qcow2" else "raw"
            tail = (",iothread=io0" if self.iothread else "") + self.device_options
            storage = f"nbd,server.type=unix,server.path={path}" if path.suffix == ".sock" else f"file,filename={path}"
            argv += ["-blockdev", f"{storage},node-name={target}-file,discard=unmap",
                     "-blockdev", f"{kind},file={target}-file,node-name={target.upper()},discard=unmap",
                     "-device", f"virtio-blk-pci,drive={target.upper()},id={target}{tail}"]  # fmt: skip
        self.process = subprocess.Popen(argv, stdout=self.output.open("ab"), stderr=subprocess.STDOUT)
        self.monitor = Qmp(self.socket)
        return self

    @property
    def uri(self):
        """For `hypervisor.connect`, running or not."""
        disks = "".join(f"&disk={t}:{'qcow2' if p.suffix == '.qcow2' else 'raw'}:{p}" for t, p in self.disks.items())
        # Its own: what another test left half-way reverted on this host must not be of the same domain.
        own = uuid.uuid5(uuid.NAMESPACE_URL, str(self.folder))
        return f"qmp://{self.other_socket}?name=bare&uuid={own}{disks}"

    def hmp(self, target, command):
        """One qemu-io command on the disk as the guest's device sees it; what it printed, which goes to QEMU's own
        output."""
        seen = self.output.stat().st_size
        self.monitor.execute("human-monitor-command", command_line=f'qemu-io -d {self.device(target)} "{command}"')
        return self.output.read_bytes()[seen:].decode()

    def write(self, target, model, offset, length, byte):
        """A guest write, done to the model too."""
        assert f"wrote {length}/" in (answer := self.hmp(target, f"write -P {byte} {offset} {length}")), answer
        model[offset : offset + length] = bytes([byte]) * length

    def zero(self, target, model, offset, length):
        """The guest writes zeroes without data."""
        assert f"wrote {length}/" in (answer := self.hmp(target, f"write -z -u {offset} {length}")), answer
        model[offset : offset + length] = bytes(length)

    def same(self, target, offset, length, byte):
        """A guest read of one repeated byte; whether it was."""
        answer = self.hmp(target, f"read -P {byte} {offset} {length}")
        return f"read {length}/" in answer and "erification failed" not in answer

    def quit(self):
        self.monitor.execute("quit")
        self.process.wait(20)
        self.monitor.close()

    def kill(self):
        """SIGKILL, as after a power cut of the guest."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, 9)
            self.process.wait()
