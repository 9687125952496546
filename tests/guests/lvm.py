"""A volume group with one linear volume on a piece of a disk image, made without a device mapper.

LVM's tools write their metadata to a loop device; nothing is activated, so a kernel without device mapper will do. The
volume's content is then written into the image at the place that is returned.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["make_volume"]


def make_volume(image: Path, offset: int, length: int, group: str, volume: str) -> tuple[int, int]:
    """Make volume `group`/`volume` of all of the piece at `offset` of `length` bytes. Where it lies in the image.

    Bytes from the image's start, and its length. Needs root. No other device of this machine is looked at.
    """
    with _loop(image, offset, length) as device, tempfile.TemporaryDirectory() as scratch:
        settings = _settings(device, scratch)

        def lvm(*words: str) -> str:
            command = ["lvm", *words[:1], "--config", settings, "--driverloaded", "n", *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
            return done.stdout

        lvm("pvcreate", "-y", device)
        lvm("vgcreate", group, device)
        lvm("lvcreate", "-an", "-Zn", "-Wn", "-l", "100%FREE", "-n", volume, group)
        bare = ("--noheadings", "--nosuffix", "--units", "b", "-o")
        start = int(lvm("pvs", *bare, "pe_start", device))
        size = int(lvm("lvs", *bare, "lv_size", f"{group}/{volume}"))
    return offset + start, size


def _settings(device: str, scratch: str) -> str:
    """Only this device, no word to this machine's udev, no trace in its /etc and /run."""
    return f"""
        devices {{ filter=["a|^{device}$|","r|.*|"] use_devicesfile=0 scan=["/dev"] obtain_device_list_from_udev=0
                  external_device_info_source="none" }}
        backup {{ backup=0 archive=0 }}
        global {{ locking_dir="{scratch}" use_lvmpolld=0 system_id_source="none" }}
        activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
    """


@contextmanager
def _loop(image: Path, offset: int, length: int) -> Iterator[str]:
    command = ["losetup", "--show", "--find", f"--offset={offset}", f"--sizelimit={length}", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
