"""`machine.sh` on made-up machines: a folder with the files of /sys and /proc that it reads (P6-21, P6-25)."""

from __future__ import annotations

import json
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from appliance.errors import BadInventory
from images import hardware
from images.model import Firmware

SCRIPT = Path(str(files("images.hardware") / "machine.sh"))
NVME = "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02"
CARD = "pci:v00008086d000015BCsv000017AAsd00002292bc02sc00i00"
RADIO = "pci:v00008086d00009DF0sv00008086sd00000030bc02sc80i00"
CPU = "cpu:type:x86,ven0000fam0006mod008E:feature:,0000,0001,0002"
SECURE = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


class Box:
    """A machine as files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put("arch", "x86_64\n")
        self.put("sys/class/dmi/id/product_name", "ThinkPad X1 Carbon 6th\n")
        self.put("proc/meminfo", "MemTotal:       16158420 kB\nMemFree: 1 kB\n")
        self.put("sys/devices/system/cpu/modalias", CPU + "\n")

    def put(self, path: str, text: str | bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def device(self, bus: str, slot: str, alias: str | bytes, driver: str = "") -> Path:
        self.put(f"sys/devices/{slot}/modalias", alias if isinstance(alias, bytes) else alias + "\n")
        folder = self.root / "sys/bus" / bus / "devices" / slot
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(self.root / "sys/devices" / slot)
        if driver:
            (self.root / "sys/bus" / bus / "drivers" / driver).mkdir(parents=True)
            (self.root / "sys/devices" / slot / "driver").symlink_to(self.root / "sys/bus" / bus / "drivers" / driver)
        return self.root / "sys/devices" / slot

    def nic(self, name: str, slot: str, mac: str) -> None:
        self.put(f"sys/class/net/{name}/address", mac + "\n")
        (self.root / "sys/class/net" / name / "device").symlink_to(self.root / "sys/devices" / slot)

    def run(self, *shell: str) -> str:
        done = subprocess.run([*shell, str(SCRIPT), str(self.root)], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout


@pytest.fixture
def box(tmp_path) -> Box:
    return Box(tmp_path)


@pytest.mark.parametrize("shell", [("dash",), ("bash", "--posix")], ids=["dash", "bash"])
def test_a_uefi_machine_with_secure_boot_and_a_tpm(box, shell):
    """P6-21: all that a plan needs, from files that any Linux on the machine shows."""
    box.put(SECURE, b"\x06\x00\x00\x00\x01")
    box.put("sys/class/tpm/tpm0/dev", "10:224\n")
    box.put("sys/class/tty/console/active", "tty0 ttyS1\n")
    box.device("pci", "0000:3d:00.0", NVME, "nvme")
    box.device("pci", "0000:00:1f.6", CARD, "e1000e")
    box.device("pci", "0000:00:14.3", RADIO)
    box.nic("enp0s31f6", "0000:00:1f.6", "E8:6A:64:00:11:22")
    box.nic("wlp0s20f3", "0000:00:14.3", "48:89:e7:00:11:22")
    box.put("sys/class/net/wlp0s20f3/phy80211/index", "0")
    box.put("sys/class/net/lo/address", "00:00:00:00:00:00\n")
    found = hardware.from_script_output(box.run(*shell))
    assert (found.name, found.source, found.firmware) == ("thinkpad-x1-carbon-6th", "script", Firmware.UEFI)
    assert found.secure_boot and found.tpm and found.console == "ttyS1"
    assert found.memory_bytes == 16158420 * 1024
    told = {one.slot: (one.modalias, one.description) for one in found.devices}
    assert told["0000:3d:00.0"] == (NVME, "driver nvme") and told["0000:00:14.3"] == (RADIO, "")
    assert told["cpu"] == (CPU, "")
    assert [(nic.modalias, nic.mac, nic.slot, nic.wanted) for nic in found.nics] == [
        (CARD, "e8:6a:64:00:11:22", "0000:00:1f.6", True),
        (RADIO, "48:89:e7:00:11:22", "0000:00:14.3", False),
    ]
    assert any("enp0s31f6" in note for note in found.notes)


def test_a_bios_machine_with_next_to_nothing(box):
    (box.root / "sys/class/dmi/id/product_name").unlink()
    box.put("sys/class/tty/ttyS0/type", "0\n")
    box.put("sys/class/tty/ttyS2/type", "4\n")
    found = hardware.from_script_output(box.run("dash"))
    assert (found.name, found.firmware, found.secure_boot, found.tpm) == ("machine", Firmware.BIOS, False, False)
    assert found.console == "ttyS2" and found.nics == () and [one.modalias for one in found.devices] == [CPU]


def test_secure_boot_that_is_switched_off(box):
    box.put(SECURE, b"\x06\x00\x00\x00\x00")
    found = hardware.from_script_output(box.run("dash"))
    assert found.firmware is Firmware.UEFI and not found.secure_boot


def test_a_bonded_card_tells_its_own_address(box):
    box.device("pci", "0000:00:1f.6", CARD)
    box.nic("eth0", "0000:00:1f.6", "02:00:00:00:00:99")
    box.put("sys/class/net/eth0/bonding_slave/perm_hwaddr", "e8:6a:64:00:11:22\n")
    (nic,) = hardware.from_script_output(box.run("dash")).nics
    assert nic.mac == "e8:6a:64:00:11:22"


def test_texts_of_a_careless_vendor_stay_json(box):
    """Quotes, backslashes, control characters, letters of another code page, words of the shell."""
    box.put("sys/class/dmi/id/product_name", b'  "X\\ $(touch hacked) `id` \xe9\xff\x01\t 9" \n')
    box.device("acpi", "dev0", b'acpi:"\\$(id)\xe9\x02:\n')
    box.device("acpi", "dev1", b"no colon\n")
    box.device("acpi", "dev2", b"")
    text = box.run("dash")
    assert json.loads(text)["devices"][0]["modalias"] == 'acpi:"\\$(id):'
    found = hardware.from_script_output(text)
    assert found.name.startswith("x") and found.devices[0].modalias == 'acpi:"\\$(id):'
    assert {one.slot for one in found.devices} == {"dev0", "cpu"}


def test_another_architecture_is_refused_by_name(box):
    box.put("arch", "aarch64\n")
    with pytest.raises(BadInventory) as caught:
        hardware.from_script_output(box.run("dash"), target="arm")
    assert caught.value.fields["field"] == "arch" and "aarch64" in str(caught.value)


def test_output_that_was_cut_off_is_refused(box):
    text = box.run("dash")
    with pytest.raises(BadInventory, match="not JSON"):
        hardware.from_script_output(text[: len(text) // 2])
