"""What a Windows' registry tells, and the one change that we make, on hives that hivex made."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from appliance.errors import GuestUnreadable
from images.guest import _tell_windows
from images.guest.reader import ConfinedTree
from images.guest.registry import read_hives, set_boot_start, windows_on
from images.guest.signature import recognise
from images.guest.volumes import Volume
from images.guest.windows import IsWindows, Windows, firmware_of
from images.model import Firmware
from tests.support.guestdisk import image_of
from tests.support.windowsdisk import Open, empty_hive, system

_FACTS = {"volume": "vda1", "control_set": "ControlSet001", "state": "clean", "whole": True}


def test_the_current_control_set_is_read_and_no_other(tmp_path):
    found = read_hives(Open(system(tmp_path / "SYSTEM", {"storahci": 3, "stornvme": 0})))
    assert found == {
        "control_set": "ControlSet002", "arch": "AMD64", "host": "DESK",
        "services": {"storahci": {"start": 3}, "stornvme": {"start": 0}},
    }  # fmt: skip


def test_a_driver_starts_at_boot_and_nothing_overrides_it(tmp_path):
    """Nothing else changes: not another driver, not another control set."""
    path = system(tmp_path / "SYSTEM", {"storahci": 3, "msahci": 3})
    hive = Open(path, write=True)
    set_boot_start(hive, "ControlSet002", ["storahci"])
    hive.commit()
    assert starts(path, "ControlSet002") == {"storahci": (0, False), "msahci": (3, True)}
    assert starts(path, "ControlSet001") == {"storahci": (3, False)}


def starts(path, control_set):
    """Of each service, and whether it has a StartOverride."""
    hive, found = Open(path), {}
    services = hive.hivex_node_get_child(hive.hivex_node_get_child(hive.hivex_root(), control_set), "Services")
    for name in ("storahci", "msahci"):
        if node := hive.hivex_node_get_child(services, name):
            start = hive.hivex_value_value(hive.hivex_node_get_value(node, "Start"))
            found[name] = (int.from_bytes(start, "little"), bool(hive.hivex_node_get_child(node, "StartOverride")))
    return found


def test_a_driver_without_a_service_is_refused(tmp_path):
    hive = Open(system(tmp_path / "SYSTEM", {"storahci": 3}), write=True)
    with pytest.raises(GuestUnreadable, match="no service 'stornvme'"):
        set_boot_start(hive, "ControlSet002", ["stornvme"])


def test_a_hive_that_is_no_system_is_refused(tmp_path):
    with pytest.raises(GuestUnreadable, match="current control set"):
        read_hives(Open(empty_hive(tmp_path / "SYSTEM")))


def test_a_damaged_hive_is_an_error_and_its_facts_are_checked(tmp_path):
    """Each in a process of its own, as a reader has it: hivex may do what it likes with them, but what comes out is
    fit for the model or an error."""
    whole = system(tmp_path / "SYSTEM", {"storahci": 3}).read_bytes()
    dice, paths = random.Random(7), []
    for number in range(60):
        damaged = bytearray(whole)
        for _ in range(dice.randrange(1, 20)):
            damaged[dice.randrange(4096, len(damaged))] = dice.randrange(256)
        paths.append(tmp_path / f"damaged{number}")
        paths[-1].write_bytes(damaged)
    done = subprocess.run([sys.executable, "-c", _READ, *paths], capture_output=True, text=True, timeout=25)
    assert done.returncode == 0 and done.stdout.split().count("seen") == 60, done.stderr[-2000:]


_READ = f"""
import os, sys
from appliance.errors import GuestUnreadable
from images.guest.registry import read_hives
from images.guest.windows import Windows
from tests.support.windowsdisk import Open
for path in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            Windows(**{{**{_FACTS!r}, **read_hives(Open(path))}})
        except (RuntimeError, GuestUnreadable):
            pass
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("seen" if status == 0 else status, flush=True)
"""


def test_ntfs_is_recognised(tmp_path):
    """Or the general reader would not be asked."""
    image = tmp_path / "ntfs"
    image.write_bytes((b"\xebR\x90NTFS    ".ljust(72, b"\0") + bytes(range(1, 9))).ljust(1 << 16, b"\0"))
    found = recognise(image_of(image))
    assert (found.fs, found.uuid) == ("ntfs", "0807060504030201")


class Reader:
    """The general one, of a guest with these volumes."""

    def __init__(self, told):
        self._told = told

    def volumes(self):
        return (Volume(name="vda1", fs="ntfs", disks=("vda",), mountable=True), Volume(name="vdb1", disks=("vdb",)))

    def windows(self, volume):
        return Windows.model_validate(self._told) if self._told and volume == "vda1" else None


def test_the_refusal_says_that_it_is_windows_and_where():
    with pytest.raises(IsWindows, match=r"it is Windows 11 Home, on vda1, and this is for Linux guests") as refused:
        _tell_windows(Reader({**_FACTS, "product": "Windows 11 Home"}))
    assert refused.value.windows.product == "Windows 11 Home" and "image plan" in str(refused.value.hint)
    _tell_windows(Reader(None))


def test_the_firmware_is_told_by_the_partitions():
    esp = Volume(name="vda1", disks=("vda",), kind="c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
    assert firmware_of([esp]) is Firmware.UEFI and firmware_of([]) is Firmware.BIOS


def test_nothing_that_it_tells_drives_a_terminal():
    assert Windows(**_FACTS, product="Windows\x1b[2J").product == "Windows?[2J"


class OnData:
    """libguestfs with an NTFS that has no folder of Windows."""

    def umount_all(self):
        pass

    def ntfs_3g_probe(self, _rw, _device):
        return 0

    def mount_ro(self, _device, _where):
        pass

    def case_sensitive_path(self, path):
        raise RuntimeError(f"case_sensitive_path: {path.split('/')[1]}: not found")


def test_a_data_disk_and_the_partition_before_windows_are_none():
    """Or the real one, which comes after, would not be looked at."""
    assert windows_on(OnData(), "/dev/sda1") is None


def test_a_file_that_a_hive_led_to_and_is_not_there_is_a_refusal(monkeypatch):
    tree = object.__new__(ConfinedTree)
    monkeypatch.setattr(ConfinedTree, "_ask", raiser(FileNotFoundError("x")))
    monkeypatch.setattr(ConfinedTree, "_end", lambda _, reason: GuestUnreadable(what="the point", reason=reason))
    with pytest.raises(GuestUnreadable):
        tree.windows("vda1")
    with pytest.raises(GuestUnreadable):
        tree.start_at_boot("vda1", "ControlSet001", ["storahci"])


def raiser(error):
    def fail(*_):
        raise error

    return fail
