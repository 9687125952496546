"""One process at a time in a domain's block graph, whichever home it works for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from appliance.errors import Locked, PermissionDenied
from appliance.hypervisor import hostlock

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.touch()
    return path


def hold(names, home="/home-a", wait=0.0, say=lambda _text: None):
    return hostlock.hold(names, "web", Path(home), "point web", wait, say)


def test_one_image_one_lock_whatever_its_name(image, tmp_path):
    """P5-03: a guest may be known under two UUIDs and its image under two paths."""
    (tmp_path / "link").symlink_to(image)
    (tmp_path / "hard").hardlink_to(image)
    first = hostlock.names_of("u-1", [str(image)])
    with hold(first):
        for other in ("link", "hard"):
            names = hostlock.names_of("u-2", [str(tmp_path / other), "nbd://somewhere"])
            assert set(first) & set(names)
            with pytest.raises(Locked) as caught, hold(names, "/home-b"):
                pass
        assert "home /home-a" in caught.value.message and str(os.getpid()) in caught.value.message
        with hold(hostlock.names_of("u-2", [])):
            pass
    with hold(names, "/home-b"):
        pass


def test_the_second_waits_and_is_told_for_whom(image):
    names, said = hostlock.names_of("u-3", [str(image)]), []
    held, leave = threading.Event(), threading.Event()

    def first():
        with hold(names):
            held.set()
            leave.wait(10)

    def say(text):
        said.append(text)
        leave.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(10)
    with hold(names, "/home-b", wait=10, say=say):
        pass
    thread.join()
    assert len(said) == 1 and "home /home-a" in said[0]


def test_a_holder_that_is_killed_lets_go(image):
    names = hostlock.names_of("u-4", [str(image)])
    code = (
        "import sys, time; from pathlib import Path; from appliance.hypervisor import hostlock\n"
        "with hostlock.hold(sys.argv[1:], 'web', Path('/x'), 'point web'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, *names], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Locked), hold(names):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with hold(names):
        pass


def test_a_folder_that_somebody_else_put_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(PermissionDenied):
        hostlock.folder()
