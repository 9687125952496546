"""export and restore, without a hypervisor."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.units import CHUNK
from tests.support.clihome import (
    ROOT,
    SIZE,
)


def exported(home, *words):
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance.cli", "--home", str(home), "--json", "export", "web", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_a_point_is_served_until_it_is_interrupted(web, number, code):
    """P0-06, A10: what nbdinfo reads is what was stored."""
    process, line = exported(web.home, "--at", "before-upgrade")
    try:
        assert (line["disk"], line["size_bytes"], line["writable"]) == ("vda", SIZE, False)
        information = json.loads(subprocess.check_output(["nbdinfo", "--json", line["uri"]], text=True))
        assert information["exports"][0]["export-size"] == SIZE
        mapped = subprocess.check_output(["nbdinfo", "--map", "--totals", line["uri"]], text=True)
        assert mapped.split()[0] == str(4 * CHUNK), mapped
    finally:
        process.send_signal(number)
    assert process.wait(10) == code, process.stderr.read()
    assert not list((web.home / "run").iterdir())


def test_a_locked_key_reaches_every_server_of_an_export(web, monkeypatch):
    """The key goes to our children through a descriptor, never through a file or an argument."""
    monkeypatch.setenv("REWIND_PASSPHRASE", "one")
    assert web("key", "passphrase") == 0
    process, line = exported(web.home, "--at", "latest", "--writable")
    try:
        assert subprocess.run(["nbdinfo", "--size", line["uri"]], capture_output=True, text=True).stdout.strip() == str(
            SIZE
        )
        for path in web.home.rglob("*"):
            if path.is_file() and path.stat().st_size < 1 << 20:
                assert b'"secret"' not in path.read_bytes(), path
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_an_export_cannot_be_on_a_socket_that_exists(web, tmp_path):
    (tmp_path / "s").touch()
    web.fails(55, "export", "web", "--at", "latest", "--socket", tmp_path / "s")


def test_an_export_cannot_be_on_a_socket_in_a_folder_that_is_not_there(web, tmp_path):
    """A12"""
    message, _hint = web.fails(3, "export", "web", "--at", "latest", "--socket", tmp_path / "none" / "s")
    assert "there is no folder" in message


def test_restore_writes_whole_new_disks(web, tmp_path):
    """P0-06: out of place, with nothing of the old domain needed."""
    found = web.json("restore", "web", "--at", "latest", "--into", tmp_path / "new", "--format", "raw")
    assert web.code == 0, found
    data = Path(found[-1]["files"][0]).read_bytes()
    assert data[: 2 * CHUNK] == bytes([1, 0]) * (CHUNK // 2) + bytes([1, 1]) * (CHUNK // 2)
    assert not any(data[8 * CHUNK :])
    assert (found[-1]["defined"], len(data)) == (False, -(-SIZE // 512) * 512)
    message, _hint = web.fails(55, "restore", "web", "--at", "latest", "--into", tmp_path / "new", "--format", "raw")
    assert "web-vda.raw" in message


@pytest.mark.parametrize("below", ["", "new"])
def test_a_restore_into_a_file_is_refused(web, tmp_path, below):
    """A12: it is a folder that is wanted."""
    (tmp_path / "file").touch()
    message, _hint = web.fails(3, "restore", "web", "--at", "latest", "--into", tmp_path / "file" / below)
    assert str(tmp_path / "file") in message


def test_a_restore_that_cannot_define_a_domain_writes_nothing(web, tmp_path):
    """The point says nothing that libvirt could read, so --name is refused before a disk is written."""
    web.fails(15, "restore", "web", "--at", "latest", "--into", tmp_path / "new", "--name", "web2")
    assert not (tmp_path / "new").exists()


def test_a_restore_that_fails_leaves_no_file(web, tmp_path, monkeypatch):
    from appliance.errors import NoSpace
    from appliance.restore import image

    def full(*_, **__):
        raise NoSpace(url="here", name="disk")

    monkeypatch.setattr(image, "write_image", full)
    web.fails(37, "restore", "web", "--at", "latest", "--into", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
