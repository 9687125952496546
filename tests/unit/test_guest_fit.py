"""Disks of another size for the same content, with tables as sfdisk makes and reads them."""

import os
import subprocess

import pytest

from appliance.errors import ImageError
from images.guest.fit import HEAD, check_fit, least, tables_for
from images.guest.volumes import find_volumes
from tests.support.guestdisk import FileBlocks

MiB = 1 << 20


def volumes_of(path):
    return tuple(one.volume for one in find_volumes({"vda": FileBlocks(path)}))


def test_a_disk_becomes_smaller_as_far_as_its_partitions_allow(tmp_path):
    """P6-18: refused with the least that there has to be, in words that can be typed."""
    disk = tmp_path / "disk"
    disk.open("wb").truncate(64 * MiB)
    subprocess.run(["sfdisk", "-q", disk], input="label: dos\nstart=2048, size=40960\n", text=True, check=True)
    volumes = volumes_of(disk)
    assert least("vda", 64 * MiB, volumes) == 21 * MiB
    assert check_fit("vda", 64 * MiB, 21 * MiB, volumes) is False
    with pytest.raises(ImageError, match="vda1 ends at byte 22020096, and nothing is moved") as caught:
        check_fit("vda", 64 * MiB, 20 * MiB, volumes)
    assert caught.value.hint == "`--size vda=21M` is the least"
    assert least("vda", 64 * MiB, [one.model_copy(update={"layers": (), "number": 0}) for one in volumes]) == 64 * MiB
    with pytest.raises(ImageError, match="no whole number of sectors"):
        check_fit("vda", 64 * MiB, 64 * MiB - 1, volumes)


def test_a_gpt_of_a_smaller_disk_has_both_its_tables(tmp_path):
    """P6-18: identities, names and the boot code stay; without new tables there would be no partitions."""
    disk = tmp_path / "disk"
    disk.open("wb").truncate(64 * MiB)
    table = (
        "label: gpt\nstart=2048, size=20480, name=one\nstart=22528, size=20480, name=two, attrs=LegacyBIOSBootable\n"
    )
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)
    with disk.open("r+b") as file:
        file.write(b"boot code")
    volumes = volumes_of(disk)
    needs = least("vda", 64 * MiB, volumes)
    assert needs == 22 * MiB and check_fit("vda", 64 * MiB, needs, volumes) is True
    assert check_fit("vda", 64 * MiB, 80 * MiB, volumes) is False
    head = disk.read_bytes()[:HEAD]
    small = tmp_path / "small"
    small.write_bytes(head)
    os.truncate(small, needs)
    with small.open("r+b") as file:
        for offset, data in tables_for(head, 64 * MiB, needs):
            file.seek(offset)
            file.write(data)
    assert small.stat().st_size == needs and small.read_bytes().startswith(b"boot code")
    done = subprocess.run(["sfdisk", "--verify", small], capture_output=True, text=True, check=True)
    assert "No errors detected" in done.stdout and not done.stderr, done
    assert volumes_of(small) == volumes
    with small.open("r+b") as file:  # the second one alone
        file.seek(512)
        file.write(bytes(512))
    assert volumes_of(small) == volumes
