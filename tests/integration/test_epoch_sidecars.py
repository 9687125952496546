"""UEFI variables and the TPM's state belong to a point, running and shut off."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
from pathlib import Path

import pytest

from appliance.model import DiskKind
from appliance.restore.revert import Reverter
from appliance.service import elsewhere
from appliance.service.session import Session
from appliance.service.setup import init
from appliance.units import MiB
from tests.support import libvirt
from tests.support.protect import Protected
from tests.support.tiny import make_disk

_NEEDED = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")


@pytest.fixture
def firmware_domain(libvirt_images):
    if not shutil.which("swtpm_setup") or not all(Path(path).exists() for path in _NEEDED):
        pytest.skip("needs ovmf, swtpm and swtpm-tools")
    disk = make_disk(libvirt_images / "a.qcow2", 8 * MiB)
    path = libvirt_images / "uefi.xml"
    path.write_text(f"""
<domain type='qemu'><name>uefi</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='pflash'>{_NEEDED[0]}</loader>
    <nvram template='{_NEEDED[1]}'>{libvirt_images}/vars.fd</nvram></os>
  <features><acpi/></features>
  <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
    <target dev='vda' bus='virtio'/></disk>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <controller type='usb' model='none'/><memballoon model='none'/></devices></domain>""")
    libvirt.virsh("define", str(path))
    yield libvirt_images
    libvirt.virsh("destroy", "uefi", check=False)
    libvirt.virsh("undefine", "uefi", "--nvram", check=False)


@pytest.mark.timeout(150)
def test_firmware_and_tpm_belong_to_the_point(firmware_domain, tmp_path):
    """P5-15: stored with the disks, as they are at the instant; unchanged, they cost nothing."""
    started = libvirt.virsh("start", "uefi", check=False)
    if started.returncode and "swtpm" in started.stderr + started.stdout:
        pytest.skip(f"this host cannot start a TPM: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    time.sleep(3)
    with Protected(tmp_path, libvirt.URI, "uefi") as protected:
        live = protected.point()
        assert [(disk.disk, disk.kind) for disk in live.disks] == [
            ("vda", DiskKind.DISK), ("nvram", DiskKind.NVRAM), ("tpm", DiskKind.TPM),
        ]  # fmt: skip
        assert "<name>uefi</name>" in live.xml
        libvirt.virsh("destroy", "uefi")
        off = protected.point()
        assert protected.content(off, "nvram") == (firmware_domain / "vars.fd").read_bytes()
        assert off.disk("nvram").source == str(firmware_domain / "vars.fd")
        state = Path(off.disk("tpm").source)
        with tarfile.open(fileobj=io.BytesIO(protected.content(off, "tpm"))) as archive:
            files = [one for one in archive.getmembers() if one.isfile()]
            assert files
            for one in files:
                assert archive.extractfile(one).read() == (state / one.name).read_bytes()
        again = protected.point()
        assert [d.map.root for d in again.disks] == [d.map.root for d in off.disks]
        assert all(disk.changed == () for disk in again.disks)
        back_with_the_disks(protected, off, firmware_domain / "vars.fd", state)
        in_a_new_domain(protected, off, firmware_domain / "vars.fd", tmp_path / "new")


def back_with_the_disks(protected, point, variables, tpm):
    """A revert of the shut-off domain takes both back, and `undo` brings them again."""
    before = contents(variables, tpm)
    variables.write_bytes(variables.read_bytes().replace(b"\0", b"\1", 1))
    largest = max((path for path in tpm.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    owner = (largest.stat().st_uid, largest.stat().st_mode)
    largest.write_bytes(b"foreign")
    changed = contents(variables, tpm)
    reverter = Reverter(protected.home, protected.settings, protected.spec, protected.repo, protected.domain)
    assert reverter.plan(point).notes == ()
    assert reverter.revert(point).state == "done"
    assert contents(variables, tpm) == before
    assert (largest.stat().st_uid, largest.stat().st_mode) == owner
    libvirt.virsh("start", "uefi")  # swtpm takes its state
    libvirt.virsh("destroy", "uefi")
    assert reverter.undo().state == "done"
    assert contents(variables, tpm) == changed


def contents(variables, tpm):
    files = {path for path in tpm.rglob("*") if path.is_file() and not path.name.startswith(".lock")}
    return {path: path.read_bytes() for path in files | {variables}}


def in_a_new_domain(protected, point, variables, folder):
    """P0-06: `restore --name` gives the new domain variables of its own; its TPM begins empty, and that is told."""
    with Session(protected.home) as session:
        init(session, protected.spec.url, key_file=protected.folder / "key")
        restored = elsewhere.restore(session, "uefi", point.id, folder, "uefi2")
    try:
        assert (folder / "uefi2-nvram.fd").read_bytes() == protected.content(point, "nvram")
        assert str(folder / "uefi2-nvram.fd") in libvirt.virsh("dumpxml", "uefi2").stdout
        assert any("TPM" in one for one in restored.left_out)
    finally:
        libvirt.virsh("undefine", "uefi2", "--nvram", check=False)
