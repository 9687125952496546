"""A real Debian guest under the private world's libvirt: its shop, and what the shop has promised so far.

    guest = DebianGuest(folder);  guest.boot()
    guest.run("systemctl start rows")        commands go by ssh, as root
    guest.acknowledged                       number of the newest row that a client was told is committed
    guest.rows()                             what the database answers
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from tests.guests import debian as builder
from tests.support import libvirt, world

__all__ = ["DebianGuest", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The shop's orders. Exact when `count` is `newest` and each row has the content that was written."""

    count: int
    newest: int
    wrong: int

    @property
    def exact(self) -> bool:
        return self.count == self.newest and self.wrong == 0


class DebianGuest:
    """A persistent domain with one disk `vda`. Used by one thread; the serial port has a thread of its own."""

    uri = libvirt.URI

    def __init__(self, folder: Path, *, name: str = "shop", memory: int = 512, smp: int = 2) -> None:
        world.require()
        self.folder = folder
        self.name = name
        self.memory = memory
        self.smp = smp
        self.uuid = str(uuid.uuid4())
        self.files = builder.build()
        self.ssh_port = _free_port()
        self.disk = folder / f"{name}.qcow2"
        self._copy_files()
        self._defined = False
        self._serial: _Serial | None = None

    def __enter__(self) -> DebianGuest:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._defined:
            libvirt.virsh("destroy", self.name, check=False)
            libvirt.virsh("undefine", self.name, check=False)
        if self._serial is not None:
            self._serial.close()

    def _copy_files(self) -> None:
        # The cache may be in a home that QEMU's user cannot enter.
        for source, name in ((self.files.kernel, "vmlinuz"), (self.files.initrd, "initrd"), (self.files.disk, None)):
            target = self.disk if name is None else self.folder / name
            subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], check=True)
            os.chown(target, *world.qemu_ids())

    def xml(self) -> str:
        """The domain's definition. ssh comes in by a port of this machine's loopback; nothing gets out."""
        console, serial = (quoteattr(str(self.folder / f"{self.name}-{what}")) for what in ("console.log", "rows.sock"))
        net = f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{self.ssh_port}-10.0.2.15:22"
        return f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{self.name}</name><uuid>{self.uuid}</uuid>
  <memory unit='MiB'>{self.memory}</memory><vcpu>{self.smp}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{self.folder}/vmlinuz</kernel><initrd>{self.folder}/initrd</initrd>
    <cmdline>console=ttyS0 loglevel=4 mitigations=off edd=off no_timer_check systemd.show_status=false</cmdline></os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file={quoteattr(str(self.disk))}/><target dev='vda' bus='virtio'/></disk>
    <controller type='usb' model='none'/>
    <serial type='file'><source path={console} append='on'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path={serial}/><target port='1'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-netdev'/><qemu:arg value='{net}'/>
    <qemu:arg value='-device'/><qemu:arg value='virtio-net-pci,netdev=net0,addr=0x10'/>
  </qemu:commandline>
</domain>"""

    @property
    def console(self) -> str:
        """All that the kernel and systemd said."""
        path = self.folder / f"{self.name}-console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def boot(self, timeout: float = 240.0) -> None:
        """Define, start, and wait until the database answers."""
        path = self.folder / f"{self.name}.xml"
        path.write_text(self.xml())
        libvirt.virsh("define", str(path))
        self._defined = True
        libvirt.virsh("start", self.name)
        self._serial = _Serial(self.folder / f"{self.name}-rows.sock")
        self.wait_for_database(timeout)

    @property
    def log(self) -> str:
        """What libvirt and QEMU logged of the domain."""
        path = Path(f"/var/log/libvirt/qemu/{self.name}.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_database(self, timeout: float = 240.0) -> Rows:
        """What the database says as soon as it says anything."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                if not self.ssh_listens():
                    raise RuntimeError("nobody listens at the ssh port")
                return self.rows()
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the database does not answer: {error}\n{self.console[-3000:]}") from error
                time.sleep(0.5)

    # --- inside the guest --------------------------------------------------------------------------------------------

    def run(self, command: str, timeout: float = 120.0) -> str:
        """A shell command as root, by ssh. Its output; raises RuntimeError when it fails or nobody is there.

        Not through the agent: freezing for a point needs the agent for itself, and it does one thing at a time.
        """
        done = self._ssh(["-o", f"ConnectTimeout={int(timeout)}"], [command], timeout)
        if done.returncode != 0:
            raise RuntimeError(f"{command!r} in the guest: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def ssh_listens(self) -> bool:
        """Whether the guest's ssh server says its name; costs the guest next to nothing."""
        try:
            with socket.create_connection(("127.0.0.1", self.ssh_port), 2) as probe:
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def forget_connection(self) -> None:
        """After a reset: the old connection would only be found dead in time."""
        self._ssh(["-O", "exit"], [], 10)
        (self.folder / "ssh.sock").unlink(missing_ok=True)

    def _ssh(self, options: list[str], command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        # One connection for all commands: an emulated guest takes seconds to agree on keys.
        settings = [
            "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes",
            "ControlMaster=auto", f"ControlPath={self.folder}/ssh.sock", "ControlPersist=600",
            "ServerAliveInterval=10", "ServerAliveCountMax=3",
        ]  # fmt: skip
        words = [word for setting in settings for word in ("-o", setting)]
        key = ["-i", str(self.files.ssh_key), "-p", str(self.ssh_port)]
        # A file and not a pipe: the connection that stays in the background would hold a pipe open.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(
                ["ssh", *words, *options, *key, "root@127.0.0.1", *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout + 5, check=False,
            )  # fmt: skip
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())

    def sql(self, statement: str, database: str = "shop") -> str:
        quoted = statement.replace("'", "'\\''")
        as_postgres = "cd /; setpriv --reuid postgres --regid postgres --init-groups"
        return self.run(f"{as_postgres} psql -qAtX {database} -c '{quoted}'")

    def rows(self) -> Rows:
        """Ask the database; the content of every row is checked there."""
        wrong = "count(*) filter (where content <> repeat(md5(id::text), 8))"
        answer = self.sql(f"select count(*), coalesce(max(id), 0), {wrong} from orders")
        count, newest, wrong = (int(word) for word in answer.strip().split("|"))
        return Rows(count, newest, wrong)

    def documents_intact(self) -> bool:
        """Do all documents have the hashes that were written when the guest was built?"""
        try:
            self.run("cd /srv/documents && sha256sum --quiet -c ../documents.sha256")
        except RuntimeError:
            return False
        return True

    # --- what clients were promised ----------------------------------------------------------------------------------

    @property
    def acknowledged(self) -> int:
        """The newest row of which a client was told that it is committed; 0 before the first."""
        assert self._serial is not None
        return self._serial.newest

    def forget_promises(self) -> None:
        """Those of a future that was left count no more."""
        assert self._serial is not None
        self._serial.newest = 0

    def listen(self, heard: Callable[[bytes], None]) -> None:
        """Have every further line of the second serial port told, in the thread that reads it."""
        assert self._serial is not None
        self._serial.heard = heard

    def say(self, data: bytes) -> None:
        """To whoever reads the second serial port in the guest."""
        assert self._serial is not None
        self._serial.say(data)

    def wait_acknowledged(self, number: int, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while self.acknowledged < number:
            if time.monotonic() > deadline:
                raise RuntimeError(f"row {number} is not committed in time; newest {self.acknowledged}")
            time.sleep(0.05)


class _Serial:
    """Reads the second serial port: each line `ack N` is a promise to a client."""

    def __init__(self, path: Path) -> None:
        self.newest = 0
        self.heard: Callable[[bytes], None] = lambda line: None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        pending = b""
        with contextlib.suppress(OSError):
            while data := self._socket.recv(4096):
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    # A reset may cut a line short; what is left of it is no promise.
                    if found := re.fullmatch(rb"(?:ack|start) (\d+)\r?", line):
                        self.newest = int(found.group(1))
                    self.heard(line)

    def say(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
