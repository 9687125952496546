"""The fence: the hook script as libvirt would call it, and the image lock as QEMU sees it."""

import os
import shutil
import subprocess

import pytest

from appliance.config import Home
from appliance.errors import FenceError
from appliance.restore import fence

UUID = "0b1a3c52-7a3e-4a0f-9c77-1b1d3c5e7f90"
XML = f"<domain type='qemu'>\n  <name>web</name>\n  <uuid>{UUID}</uuid>\n  <metadata>\n    <uuid>0-0</uuid>\n"


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "a home's")
    home.create()
    return home


def call(path, *words, xml=XML):
    return subprocess.run([path, *words], input=xml, text=True, capture_output=True, timeout=10)


def test_refuses_only_the_start_of_a_fenced_domain(home, tmp_path):
    """P5-36: the start is refused with one sentence that names the remedy; every other call is silent."""
    state = fence.install(home, tmp_path / "hooks")
    start = ("web", "prepare", "begin", "-")
    assert call(state.path, *start).returncode == 0
    fence.put_up(home, UUID)
    fence.put_up(home, UUID)
    refused = call(state.path, *start)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert f"resume web" in refused.stderr  # noqa: F541
    for words in (("web", "stopped", "end", "-"), ("web", "release", "end", "-"), ("web", "start", "begin", "-")):
        quiet = call(state.path, *words)
        assert (quiet.returncode, quiet.stderr, quiet.stdout) == (0, "", "")
    assert call(state.path, *start, xml=XML.replace(UUID, UUID[::-1])).returncode == 0
    assert call(state.path, *start, xml="").returncode == 0
    fence.take_down(home, UUID)
    fence.take_down(home, UUID)
    assert call(state.path, *start).returncode == 0


def test_install_and_status(home, tmp_path):
    """Installed once, renewed when it was changed, gone when asked; two homes do not disturb each other."""
    hooks = tmp_path / "hooks"
    assert not fence.status(home, hooks).installed
    assert "doctor" in fence.status(home, hooks).remedy
    first = fence.install(home, hooks)
    assert first.installed
    written = first.path.stat().st_mtime_ns
    assert fence.install(home, hooks).path.stat().st_mtime_ns == written
    first.path.write_text("#!/bin/sh\n")
    assert not fence.status(home, hooks).installed
    assert fence.install(home, hooks).installed
    other = Home(tmp_path / "other")
    other.create()
    assert fence.install(other, hooks).path != first.path
    fence.uninstall(home, hooks)
    assert not fence.status(home, hooks).installed
    assert fence.status(other, hooks).installed


def test_a_first_hook_counts_from_the_next_start_of_the_daemon(home, tmp_path, monkeypatch):
    """libvirt looks for hooks when it starts; `doctor` must not call a hook active that is not run."""
    hooks = tmp_path / "hooks"
    path = fence.install(home, hooks).path
    made = path.stat().st_ctime
    monkeypatch.setattr(fence, "_daemon_started", lambda: made - 5)
    assert "restart libvirtd" in fence.status(home, hooks).remedy
    monkeypatch.setattr(fence, "_daemon_started", lambda: made + 5)
    assert fence.status(home, hooks).active
    monkeypatch.setattr(fence, "_daemon_started", lambda: None)
    assert fence.status(home, hooks).active


def test_no_permission(home, tmp_path):
    """The reason and what to do, instead of a revert without a fence."""
    (tmp_path / "hooks").write_text("a file where the folder should be")
    with pytest.raises(FenceError, match="cannot be installed"):
        fence.install(home, tmp_path / "hooks")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(home, tmp_path):
    """The installed script is clean POSIX shell."""
    subprocess.run(["shellcheck", "-s", "sh", fence.install(home, tmp_path / "hooks").path], check=True)


def test_image_lock(tmp_path):
    """P5-36: while it is held no QEMU opens the image for writing; reading goes on; letting go frees it."""
    image = tmp_path / "d.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    write = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(image)]
    lock = fence.ImageLock([image])
    refused = subprocess.run(write, capture_output=True, text=True)
    assert 'Failed to get "write" lock' in refused.stderr + refused.stdout
    assert (
        subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", image], capture_output=True).returncode == 0
    )
    assert not lock.written_by_others()
    lock.release()
    lock.release()
    assert subprocess.run(write, capture_output=True).returncode == 0
    assert os.access(image, os.R_OK)


def test_image_lock_sees_a_writer(tmp_path):
    """One that has the image open already is told of."""
    image = tmp_path / "d.raw"
    image.write_bytes(bytes(1 << 20))
    writer = subprocess.Popen(["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer.stdin.write(b"write 0 512\n")
    writer.stdin.flush()
    writer.stdout.readline()
    lock = fence.ImageLock([image])
    assert lock.written_by_others()
    writer.communicate(b"quit\n")
    assert not lock.written_by_others()
    lock.release()
