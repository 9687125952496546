"""`./dev`: what it promises about the private world."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.support import libvirt, world
from tests.support.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]

needs_world = pytest.mark.skipif(not world.inside(), reason="needs the private world of ./dev test")


@needs_world
def test_kvm_is_masked():
    """Tests emulate, whatever the machine offers."""
    assert not os.path.exists("/dev/kvm") or os.path.isfile("/dev/kvm")


@needs_world
def test_processes_of_the_machine_are_out_of_reach():
    assert Path("/proc/1/cmdline").read_bytes().split(b"\0")[2] == b"--in-the-world"


@needs_world
def test_libvirt_starts_empty_and_comes_back(libvirt_uri):
    """The machine's own domains are not seen; a restart of the daemon is possible for tests of P5-41."""
    assert libvirt.virsh("list", "--all", "--name").stdout.strip() == ""
    libvirt.stop()
    assert libvirt.virsh("version", check=False).returncode != 0
    libvirt.start()
    assert "QEMU" in libvirt.virsh("version").stdout


@pytest.mark.parametrize("unwanted", ["", "1"])
def test_modules_are_compiled_once(unwanted, tmp_path):
    """A8: not by each process anew, also where nothing may be written into the tree."""
    look = "import importlib.util as u, appliance.units as m; print(u.cache_from_source(m.__file__))"
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPYCACHEPREFIX", "REWIND_WORLD")}
    env |= {"PYTHONDONTWRITEBYTECODE": unwanted, "REWIND_WORLD": str(tmp_path)}  # no world in the world
    done = subprocess.run(
        [ROOT / "dev", "shell", "python", "-c", look], capture_output=True, text=True, check=True, env=env
    )
    compiled = Path(done.stdout.strip())
    assert compiled.exists()
    assert compiled.is_relative_to(ROOT) is not bool(unwanted)


@needs_world
def test_temporary_files_are_gone_with_the_world(tmp_path):
    """Whole disks among them: a killed run must not fill the machine."""
    for made in (Path(tempfile.gettempdir()), tmp_path):
        assert os.path.samefile(os.environ["TMPDIR"], world.folder() / "tmp")
        assert made.is_relative_to(os.environ["TMPDIR"])


@pytest.mark.timeout(60)
def test_nothing_to_do_is_fast():
    """P0: a second run does not install, build or ask anything."""
    cache = Path(os.environ.get("REWIND_CACHE") or Path.home() / ".cache/rewind")
    made = (cache / "venv/rewind-stamp").stat().st_mtime_ns
    took = []
    while len(took) < 3 and (not took or min(took) > 3):
        started = time.monotonic()
        done = subprocess.run([ROOT / "dev", "setup"], capture_output=True, text=True, check=True)
        took.append(time.monotonic() - started)
        assert "installing" not in done.stderr and "making" not in done.stderr
    assert (cache / "venv/rewind-stamp").stat().st_mtime_ns == made
    assert min(took) < 10, "a second on an idle machine"


@needs_world
def test_the_soak_of_images_is_the_whole_matrix_and_nothing_else():
    """I1: every target, for each client and instant."""
    command = [ROOT / "dev", "soak", "images", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert sum("::test_the_matrix[" in line for line in found) == 4 * len(TARGETS), done.stdout[-2000:] + done.stderr
    about = {line.partition("::")[0].rpartition("/")[2] for line in found}
    assert about >= {"test_image.py", "test_image_boot.py", "test_image_stream.py", "test_clients.py"}
    assert all("image" in name or name in ("test_clients.py", "test_guest_reader.py") for name in about)


def test_unknown_verb_is_one_sentence():
    done = subprocess.run([ROOT / "dev", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nonsense" in done.stderr


def test_a_shell_takes_a_command_and_no_option():
    done = subprocess.run([ROOT / "dev", "shell", "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "dev: shell takes a command and its arguments, not the option '--help' (./dev help)"


def test_the_demo_tells_that_an_answer_waits_for_the_boot(capsys):
    """Or a revert of a second reads as one of twenty."""
    from tests.demo.tell import Teller

    Teller(as_json=False).end({"answer_seconds": 20.0, "moved_bytes": 2048})
    out = capsys.readouterr().out
    assert "answer seconds (from the command, with the guest's boot): 20\n" in out and "moved bytes: 2.0 KiB" in out
