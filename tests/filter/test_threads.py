"""What the interpreter inside nbdkit keeps of a thread between two requests."""

from pathlib import Path

import pytest

from appliance import nbd
from appliance.nbdkit import Server

_PLUGIN = """
import threading
import appliance.nbdkit

API_VERSION = 2
seen = threading.local()
calls = 0

def open(readonly):
    return 1

def get_size(handle):
    return 512

def pread(handle, buf, offset, flags):
    global calls
    calls += 1
    if {kept}:
        appliance.nbdkit.keep_thread()
    seen.calls = getattr(seen, "calls", 0) + 1
    buf[:] = bytes((calls, seen.calls)).ljust(len(buf), b"\\0")
"""


@pytest.mark.parametrize(("kept", "known"), [(True, [1, 2, 3]), (False, [1, 1, 1])])
def test_a_thread_is_known_again(tmp_path, kept, known):
    """A8, P5-42: without it every request pays for a new thread state. Also that this is still needed."""
    (tmp_path / "plugin.py").write_text(_PLUGIN.format(kept=kept))
    server = Server(Path("python"), tmp_path / "sock", {"script": tmp_path / "plugin.py"}, threads=1)
    with server, nbd.connect(server.socket, "", contexts=()) as client:
        answers = [bytes(client.pread(512, 0))[:2] for _ in range(3)]
    assert [calls for calls, _ in answers] == [1, 2, 3]
    assert [mine for _, mine in answers] == known
    assert not server.alive()


def test_beyond_a_number_threads_are_only_slower(tmp_path):
    """A8, P5-42: those of closed connections leave their state behind, so it is not kept for any number of them."""
    (tmp_path / "plugin.py").write_text(
        _PLUGIN.format(kept=True) + "\nappliance.nbdkit._kept = appliance.nbdkit._MOST_KEPT - 1\n"
    )
    server = Server(Path("python"), tmp_path / "sock", {"script": tmp_path / "plugin.py"}, threads=1)
    with server:
        for known in ([1, 2], [1, 1]):
            with nbd.connect(server.socket, "", contexts=()) as client:
                assert [bytes(client.pread(512, 0))[1] for _ in range(2)] == known
