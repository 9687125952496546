"""Start a tiny guest on disks, under bare QEMU or under libvirt, and ask it what it sees.

    guest = BareGuest(folder, [TinyDisk(path)])          uri  qmp:///FOLDER/monitor.sock?name=NAME
    guest = LibvirtGuest(folder, [TinyDisk(path)])       uri  qemu:///system            (private world only)
    with guest:
        guest.boot()
        guest.ask("start 50")            …               guest.ask("stop")["seq"]
        state = stamps.check([guest.reader(0)], guest.layout)

`python -m tests.support.tiny [NAME]` in `./dev shell` leaves one running that writes, for `rewind` to be tried on.
Always software emulation, whatever the machine offers. See `tests/guests/tiny.c` for the questions.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tests.guests import tiny as builder
from tests.support import iothreads, libvirt, world
from tests.support.channel import Channel
from tests.support.stamps import Layout

__all__ = ["BareGuest", "LibvirtGuest", "TinyDisk", "TinyGuest", "make_disk"]


@dataclass(frozen=True, slots=True)
class TinyDisk:
    """A disk as it is attached. `bus` is virtio, scsi or sata; `iothread` gives it a thread of its own, unless the QEMU
    here is one with which such a disk is refused."""

    path: Path
    format: str = "qcow2"
    bus: str = "virtio"
    iothread: bool = False
    cache: str = "none"

    def __post_init__(self) -> None:
        if self.bus == "virtio" and not iothreads.protected():
            object.__setattr__(self, "iothread", False)


def make_disk(path: Path, size: int, format: str = "qcow2", backing: TinyDisk | None = None, options: str = "") -> Path:
    """A new empty image that libvirt's QEMU may use. `options` are qemu-img's (`compat=0.10`)."""
    command = ["qemu-img", "create", "-q", "-f", format]
    if backing is not None:
        command += ["-b", str(backing.path), "-F", backing.format]
    if options:
        command += ["-o", options]
    subprocess.run([*command, str(path), str(size)], check=True)
    if world.inside():
        os.chown(path, *world.qemu_ids())
    return path


class TinyGuest:
    """What both kinds share. `folder` holds sockets and the console; it must be reachable for the QEMU user.

    `data` names the guest's disks that the writers stamp (all by default), `mount` one with an ext4 to mount at /data.
    With `durable` every write is flushed before it counts, so that nothing that counted is lost when QEMU is killed.
    Not thread-safe but for `ask`.
    """

    uri: str

    def __init__(
        self,
        folder: Path,
        disks: Sequence[TinyDisk],
        *,
        name: str = "tiny",
        seed: int = 1,
        span: int = 4 << 20,
        auto_rate: int | None = None,
        data: Sequence[str] = (),
        mount: str = "",
        durable: bool = False,
        memory: int = 192,
        smp: int = 1,
        extra_append: str = "",
    ) -> None:
        self.folder = folder
        self.disks = list(disks)
        self.name = name
        self.memory = memory
        self.smp = smp
        # The same as long as the name and the folder are, so that a guest started again is the same domain.
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{folder}/{name}"))
        self._channel: Channel | None = None
        stamped = len(data) or len(self.disks) - bool(mount)
        self.layout = Layout(disks=max(1, stamped), seed=seed, span=span)
        words = ["console=ttyS0", "loglevel=4", "mitigations=off", "edd=off", "no_timer_check"]
        words += [f"rw.disks={len(self.disks)}"]
        words += [f"rw.seed={seed}", f"rw.span={span}"]
        words += [f"rw.data={','.join(data)}"] if data else []
        words += [f"rw.mount={mount}"] if mount else []
        words += ["rw.dsync=1"] if durable else []
        words += ["rw.auto=1", f"rw.rate={auto_rate}"] if auto_rate is not None else []
        self.append = " ".join([*words, extra_append]).strip()
        self.files = builder.build("generic" if any(d.bus == "sata" for d in self.disks) else "cloud")

    def __enter__(self) -> TinyGuest:
        return self

    def __exit__(self, *unused: object) -> None:
        self.kill()

    @property
    def targets(self) -> list[str]:
        """Names of the disks, as libvirt and the guest call them, in the order given."""
        counts = {"vd": 0, "sd": 0}
        names = []
        for disk in self.disks:
            prefix = "vd" if disk.bus == "virtio" else "sd"
            names.append(f"{prefix}{chr(ord('a') + counts[prefix])}")
            counts[prefix] += 1
        return names

    @property
    def console(self) -> str:
        """All that the kernel said."""
        path = self.folder / f"{self.name}-console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        raise NotImplementedError

    def boot(self, timeout: float = 60.0) -> None:
        """Start, and wait until the guest answers."""
        self.start()
        try:
            self.channel.wait_up(timeout=timeout)
        except Exception as error:
            raise RuntimeError(f"the guest does not come up; console:\n{self.console[-3000:]}") from error

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """End the guest as by kill -9."""
        raise NotImplementedError

    @property
    def channel(self) -> Channel:
        if self._channel is None:
            self._channel = Channel(self.folder / f"{self.name}-ask.sock")
        return self._channel

    def ask(self, question: str, timeout: float = 30.0) -> dict[str, Any]:
        return self.channel.ask(question, timeout)

    def reader(self, index: int) -> Callable[[int, int], bytes]:
        """Reads disk `index` of a guest that is shut off, through qemu-img, for `stamps.check`."""
        disk = self.disks[index]

        def read(offset: int, length: int) -> bytes:
            command = ["qemu-img", "dd", "-U", "-f", disk.format, "-O", "raw"]
            target = self.folder / "read.raw"
            count = (offset + length + 4095) // 4096
            subprocess.run(
                [*command, "bs=4096", f"count={count}", f"if={disk.path}", f"of={target}"], check=True
            )
            with target.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
            target.unlink()
            return data

        return read

    def _forget_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class BareGuest(TinyGuest):
    """QEMU without libvirt: a monitor for the code under test, another one for the test (`qmp`)."""

    def __init__(self, folder: Path, disks: Sequence[TinyDisk], **options: Any) -> None:
        super().__init__(folder, disks, **options)
        self.monitor_socket = folder / f"{self.name}-monitor.sock"
        self.uri = f"qmp://{self.monitor_socket}?name={self.name}"
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: _Qmp | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def arguments(self) -> list[str]:
        """The whole command line."""
        base = self.folder / self.name
        # fmt: off
        words = [
            "qemu-system-x86_64", "-name", self.name, "-uuid", self.uuid, "-machine", "q35", "-accel", "tcg",
            "-cpu", "qemu64", "-m", str(self.memory), "-smp", str(self.smp), "-nodefaults", "-display", "none",
            "-kernel", str(self.files.kernel), "-initrd", str(self.files.initrd), "-append", self.append,
            "-chardev", f"file,id=console,path={base}-console.log,append=on", "-serial", "chardev:console",
            "-chardev", f"socket,id=ask,path={base}-ask.sock,server=on,wait=off", "-serial", "chardev:ask",
            "-qmp", f"unix:{self.monitor_socket},server=on,wait=off",
            "-qmp", f"unix:{base}-test.sock,server=on,wait=off",
        ]
        # fmt: on
        if any(disk.bus == "scsi" for disk in self.disks):
            words += ["-object", "iothread,id=scsithread"]
            thread = ",iothread=scsithread" if any(d.iothread and d.bus == "scsi" for d in self.disks) else ""
            words += ["-device", f"virtio-scsi-pci,id=scsi{thread}"]
        for index, (disk, target) in enumerate(zip(self.disks, self.targets, strict=True)):
            words += self._disk_arguments(index, disk, target)
        return words

    def _disk_arguments(self, index: int, disk: TinyDisk, target: str) -> list[str]:
        direct = "on" if disk.cache == "none" else "off"
        driver = "host_device" if disk.path.is_block_device() else "file"
        words = ["-blockdev", f"driver={driver},node-name={target}-file,filename={disk.path},"
                 f"cache.direct={direct},discard=unmap"]
        words += ["-blockdev", f"driver={disk.format},node-name={target}-format,file={target}-file,"
                  f"cache.direct={direct},discard=unmap"]
        if disk.bus == "virtio":
            device = f"virtio-blk-pci,id={target},drive={target}-format,discard=on,write-cache=on"
            if disk.iothread:
                words += ["-object", f"iothread,id=thread{index}"]
                device += f",iothread=thread{index}"
        elif disk.bus == "scsi":
            device = f"scsi-hd,id={target},drive={target}-format,bus=scsi.0"
        else:
            device = f"ide-hd,id={target},drive={target}-format,bus=ide.{index}"
        return [*words, "-device", device]

    def start(self) -> None:
        for stale in ("ask", "monitor", "test"):
            (self.folder / f"{self.name}-{stale}.sock").unlink(missing_ok=True)
        self._forget_channel()
        with (self.folder / f"{self.name}-qemu.log").open("ab") as log:
            self._process = subprocess.Popen(self.arguments(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self.monitor_socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / f"{self.name}-qemu.log").read_text()[-2000:]
                raise RuntimeError(f"QEMU does not start: {said}")
            time.sleep(0.02)

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """A QMP command from the test's own monitor; `_` stands for `-` in argument names."""
        if self._qmp is None:
            self._qmp = _Qmp(self.folder / f"{self.name}-test.sock")
        return self._qmp.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def wait(self, timeout: float = 30.0) -> int:
        """Until QEMU ends by itself."""
        assert self._process is not None
        return self._process.wait(timeout)

    def kill(self) -> None:
        if self._process is not None and (ended := self._process.poll()) is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
        elif self._process is not None and ended < 0:
            said = (self.folder / f"{self.name}-qemu.log").read_text(errors="replace")[-2000:]
            print(f"QEMU of {self.name!r} was ended by signal {-ended}; it said: {said}")
        self._forget_channel()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None


class LibvirtGuest(TinyGuest):
    """A persistent domain of the private world's libvirt. `kill` destroys it but leaves it defined."""

    uri = libvirt.URI

    def __init__(self, folder: Path, disks: Sequence[TinyDisk], **options: Any) -> None:
        world.require()
        super().__init__(folder, disks, **options)
        self._defined = False

    @property
    def pid(self) -> int:
        return int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def xml(self) -> str:
        """The domain's definition."""
        kernel, initrd = self._reachable_files()
        disks = "".join(
            self._disk_xml(disk, target, index)
            for index, (disk, target) in enumerate(zip(self.disks, self.targets, strict=True))
        )
        threads = sum(disk.iothread for disk in self.disks)
        iothreads = f"<iothreads>{threads}</iothreads>" if threads else ""
        scsi = ""
        if any(disk.bus == "scsi" for disk in self.disks):
            thread = "<driver iothread='1'/>" if any(d.iothread and d.bus == "scsi" for d in self.disks) else ""
            scsi = f"<controller type='scsi' model='virtio-scsi'>{thread}</controller>"
        return f"""
<domain type='qemu'>
  <name>{self.name}</name><uuid>{self.uuid}</uuid>
  <memory unit='MiB'>{self.memory}</memory><vcpu>{self.smp}</vcpu>{iothreads}
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>{self.append}</cmdline></os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    {disks}{scsi}
    <controller type='usb' model='none'/>
    <serial type='file'><source path={quoteattr(str(self.folder / f"{self.name}-console.log"))} append='on'/>
      <target port='0'/></serial>
    <serial type='unix'><source mode='bind' path={quoteattr(str(self.folder / f"{self.name}-ask.sock"))}/>
      <target port='1'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>"""

    def _disk_xml(self, disk: TinyDisk, target: str, index: int) -> str:
        block = disk.path.is_block_device()
        kind, attribute = ("block", "dev") if block else ("file", "file")
        number = 1 + sum(d.iothread for d in self.disks[:index])
        thread = f" iothread='{number}'" if disk.iothread and disk.bus == "virtio" else ""
        return (
            f"<disk type='{kind}' device='disk'><driver name='qemu' type='{disk.format}' cache='{disk.cache}' "
            f"discard='unmap'{thread}/><source {attribute}={quoteattr(str(disk.path))}/>"
            f"<target dev='{target}' bus='{disk.bus}'/></disk>"
        )

    def _reachable_files(self) -> tuple[Path, Path]:
        # The cache may be in a home that QEMU's user cannot enter.
        folder = world.IMAGES / f"boot-{self.files.kernel.parent.name}"
        if not folder.exists():
            scratch = world.images_folder("boot")
            for file in (self.files.kernel, self.files.initrd):
                shutil.copy(file, scratch / file.name)
            with contextlib.suppress(OSError):
                scratch.rename(folder)
        return folder / "vmlinuz", folder / "initrd"

    def define(self) -> None:
        """Make the domain known to libvirt, shut off."""
        path = self.folder / f"{self.name}.xml"
        path.write_text(self.xml())
        libvirt.virsh("define", str(path))
        self._defined = True

    def start(self) -> None:
        if not self._defined:
            self.define()
        self._forget_channel()
        libvirt.virsh("start", self.name)

    def kill(self) -> None:
        self._forget_channel()
        if self._defined:
            libvirt.virsh("destroy", self.name, check=False)

    def undefine(self) -> None:
        """End it and let libvirt forget it."""
        self.kill()
        libvirt.virsh("undefine", self.name, check=False)
        self._defined = False

    def __exit__(self, *unused: object) -> None:
        self.undefine()

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """A QMP command through libvirt; `_` stands for `-` in argument names."""
        sent = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        answer = json.loads(libvirt.virsh("qemu-monitor-command", self.name, json.dumps(sent)).stdout)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["return"]


class _Qmp:
    """The least that a test needs of QMP, so that tests do not depend on the driver they test."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("r")
        self._file.readline()
        self.execute("qmp_capabilities", {})

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            line = self._file.readline()
            if not line:
                raise RuntimeError(f"{command}: QEMU closed the monitor")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _leave_one_running(name: str) -> None:
    """It belongs to libvirt, so that it outlives this process; the private world takes it along when it ends."""
    libvirt.start()
    folder = world.images_folder(name)
    guest = LibvirtGuest(folder, [TinyDisk(make_disk(folder / f"{name}.qcow2", 64 << 20))], name=name)
    guest.boot()
    guest.ask("start 20")
    print(f"guest {name!r} runs and writes 20 times a second to {guest.disks[0].path}; after a reset it stands still")


if __name__ == "__main__":
    _leave_one_running(sys.argv[1] if len(sys.argv) > 1 else "web")
