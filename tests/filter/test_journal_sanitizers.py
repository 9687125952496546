"""The plugin under the address, undefined-behaviour and thread sanitizers and valgrind, under load and restarts.

Threads are looked at in a program without nbdkit: nbdkit itself does not end under the thread sanitizer.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from appliance.journal import Journal
from appliance.journal.build import _SOURCE as SOURCE
from tests.filter.journald import Journald, MiB, replay, scribble

STRESS = Path(__file__).parent / "journal" / "stress.c"
PARTS = ["answer.c", "control.c", "crc32c.c", "journal.c", "recover.c", "room.c", "segment.c"]


def compiled(folder: Path, *options: str) -> Path:
    program = folder / "stress"
    sources = [SOURCE / part for part in PARTS]
    subprocess.run(
        [
            "gcc",
            f"-I{SOURCE}",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-g",
            "-O1",
            "-fno-omit-frame-pointer",
            "-pthread",
            *options,
            *sources,
            STRESS,
            "-o",
            program,
        ],
        check=True,
    )
    return program


def stressed(folder: Path, *command: object, requests: int, limit: int = 1 << 30) -> None:
    done = subprocess.run(
        [*map(str, command), str(folder / "spool"), str(folder / "ctl"), "4", str(requests), str(limit)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with Journal(folder / "spool") as journal:
        assert journal.verify() == [] and journal.holes() == []
        assert len(journal.sessions()) == 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["address,undefined", "thread"])
@pytest.mark.parametrize("limit", [1 << 30, 3 * MiB], ids=["room", "full"])
def test_threads_and_memory_are_in_order(tmp_path, what, limit):
    """P5-42: writers, flushes, control clients, sealing, a full spool and a restart, without a race or an error."""
    program = compiled(tmp_path, f"-fsanitize={what}", "-fno-sanitize-recover=all")
    # Without randomised addresses: newer kernels use more of them than the thread sanitizer of Debian 12 can bear.
    stressed(tmp_path, "setarch", "-R", program, requests=150, limit=limit)


@pytest.mark.timeout(120)
def test_valgrind_finds_nothing(tmp_path):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not there")
    program = compiled(tmp_path)
    stressed(tmp_path, "valgrind", "-q", "--error-exitcode=9", "--leak-check=full", program, requests=60)


@pytest.mark.timeout(60)
def test_the_whole_plugin_with_the_address_sanitizer(tmp_path):
    """Requests of every kind and length and control garbage, in nbdkit, started twice."""
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
    sizes = {"vda": 2 * MiB, "vdb": 2 * MiB}
    images = {name: bytearray(size) for name, size in sizes.items()}
    dice = random.Random(11)
    for _ in range(2):
        with Journald(tmp_path, sizes, variant="asan", env=env, segment_size="256k", commit="20ms") as tap:
            disks = {name: tap.disk(name) for name in sizes}
            threads = [
                threading.Thread(target=scribble, args=(disks[name], images[name], random.Random(dice.random()), 100))
                for name in sizes
            ]
            for thread in threads:
                thread.start()
            for _ in range(60):
                answers = tap.ask(
                    dice.choice([b"status", b"stats", b"mark x", b"seal", dice.randbytes(100).replace(b"\n", b"")])
                )
                assert len(answers) == 1
            for thread in threads:
                thread.join()
            # Killed and not stopped: a library of nbdkit waits for itself at exit under this sanitizer.
            tap.kill()
        assert "AddressSanitizer" not in tap.words() and "runtime error" not in tap.words(), tap.words()
    with Journal(tmp_path / "spool") as journal:
        assert replay(journal, sizes) == images


def test_the_environment_of_a_build_does_not_matter(tmp_path):
    """The build goes where it is told and leaves the tree as it was."""
    before = sorted(path.name for path in SOURCE.iterdir())
    subprocess.run(
        ["make", "--silent", "-C", SOURCE, f"BUILD={tmp_path}", "plugin"],
        check=True,
        env={**os.environ, "CFLAGS": "-O0"},
    )
    assert (tmp_path / "nbdkit-journal-plugin.so").exists()
    assert sorted(path.name for path in SOURCE.iterdir()) == before
