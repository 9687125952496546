"""The guest whose disk is measured: a libvirt domain in software emulation, paused, with one qcow2 disk.

It does nothing, so that nobody's figures hold a guest's work; its disk is written to through the device's own
block backend, where bitmaps see it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from appliance.hypervisor import connect
from tests.support import libvirt, world

__all__ = ["Guest"]

UUID = "5a1c0000-0000-4000-8000-00000000be9c"
_XML = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>
"""


class Guest:
    """`folder` is one that QEMU's user can enter. Used by one thread."""

    name = "bench"
    uuid = UUID

    def __init__(self, folder: Path, image: Path) -> None:
        self.uri = libvirt.start()
        self.disk = folder / "guest.qcow2"
        self._pattern = folder / "pattern"
        shutil.copyfile(image, self.disk)
        os.chown(self.disk, *world.qemu_ids())
        xml = folder / "guest.xml"
        xml.write_text(_XML.format(name=self.name, uuid=UUID, disk=self.disk))
        libvirt.virsh("define", str(xml))

    def start(self) -> None:
        libvirt.virsh("start", self.name, "--paused")

    def stop(self) -> None:
        libvirt.virsh("destroy", self.name)

    def lasting(self) -> list[int]:
        """The processes that do others' work: QEMU while it runs, libvirt's daemon."""
        files = [Path(f"/run/libvirt/qemu/{self.name}.pid"), Path("/run/libvirt/test-libvirtd.pid")]
        return [int(path.read_text()) for path in files if path.exists()]

    def write(self, granules) -> None:
        """Each of `granules` is (offset, bytes)."""
        hypervisor = connect(self.uri)
        try:
            domain = hypervisor.domain(self.name)
            device, monitor = domain.disks()[0].device, domain.monitor()
            for offset, content in granules:
                self._pattern.write_bytes(content)
                self._pattern.chmod(0o644)
                line = f'qemu-io -d {device} "write -q -s {self._pattern} {offset} {len(content)}"'
                answer = monitor.execute("human-monitor-command", command_line=line)
                if answer.strip():
                    raise RuntimeError(f"{line}: {answer}")
        finally:
            hypervisor.close()

    def forget_checkpoints(self) -> None:
        """Those of a peer, children first."""
        names = libvirt.virsh("checkpoint-list", self.name, "--name", "--topological").stdout.split()
        for name in reversed(names):
            libvirt.virsh("checkpoint-delete", self.name, name)

    def holds(self, raw: Path) -> bool:
        """Whether the disk is byte for byte this file; also while it is in use."""
        argv = ["qemu-img", "compare", "-q", "-U", "-f", "raw", "-F", "qcow2", raw, self.disk]
        return subprocess.run(argv, stdin=subprocess.DEVNULL).returncode == 0
