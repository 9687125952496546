"""What becomes of our NBD servers when the process that started them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from appliance import nbd
from appliance.journal.build import build
from appliance.nbdkit import Server
from appliance.process import lives, process_key, wait_gone
from appliance.units import CHUNK, MiB
from tests.filter.conftest import image

_PARENT = """
import sys, time
from pathlib import Path
from appliance.nbdkit import Server

plugin, socket, outlives, *words = sys.argv[1:]
server = Server(
    Path(plugin) if "/" in plugin else plugin, Path(socket), [tuple(word.split("=", 1)) for word in words],
    die_with_parent=outlives == "no",
)
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def orphan(tmp_path):
    """orphan(plugin, parameters, outlives) -> key of a server whose parent was killed."""
    keys = []

    def make(plugin, socket, parameters, outlives=False, stopped=False):
        words = [f"{name}={value}" for name, value in parameters.items()]
        argv = [sys.executable, "-c", _PARENT, str(plugin), str(socket), "yes" if outlives else "no", *words]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
            keys.append(process_key(int(parent.stdout.readline())))
            if stopped:
                os.kill(int(keys[-1].partition(":")[0]), signal.SIGSTOP)
            parent.kill()
        return keys[-1]

    yield make
    for key in keys:
        if lives(key):
            os.kill(int(key.partition(":")[0]), signal.SIGKILL)


def test_the_view_of_a_revert_goes_on(shop, orphan):
    """P5-17, A6: nobody's death may give a guest an error that waits for a block; the next keeper finds it serving."""
    data = image(1 * MiB, 5)
    view = shop.view(exports=shop.taken(vda=data))
    order = {"order": shop.run / "view.json"}
    key = orphan("view", shop.run / "other.sock", order, outlives=True)
    time.sleep(0.5)
    assert lives(key)
    with nbd.connect(shop.run / "other.sock", "vda", contexts=()) as client:
        assert bytes(client.pread(CHUNK, 0)) == bytes(data[:CHUNK])
    assert view.alive()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("kind", ["view", "intake", "journal"])
def test_all_others_end(shop, orphan, kind, stopped):
    """P5-42: also one that is stopped: a guest may wait for its answer."""
    socket = shop.run / "other.sock"
    if kind == "journal":
        spool = shop.folder / "spool"
        spool.mkdir()
        plugin, parameters = build(), {"spool": spool, "disk": f"vda:{MiB}"}
    else:
        started = shop.intake(vda=(MiB, None)) if kind == "intake" else shop.view(exports=shop.taken(vda=b"x" * MiB))
        started.kill()
        plugin, parameters = kind, {"order": shop.run / f"{kind}.json"}
    assert wait_gone(orphan(plugin, socket, parameters, stopped=stopped), 10)


def test_the_wish_is_told_to_every_server(tmp_path):
    """By its environment: nbdkit itself may ask the kernel for something else."""
    made = [Server("view", tmp_path / "s", {}, die_with_parent=one) for one in (True, False)]
    wishes = [one._env["REWIND_PARENT_DIED"] for one in made]
    assert wishes == [str(int(signal.SIGKILL)), "0"]
