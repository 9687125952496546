"""Children end when, how and with whom they should, and nobody else does."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from appliance.errors import ToolFailed
from appliance.nbdkit import last_words
from appliance.process import Child, alone, run

ROOT = Path(__file__).parents[2]


def test_run_gives_the_output_and_takes_input():
    assert run(["cat"], input="text") == "text"
    assert run(["printf", "%s", "out"]) == "out"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sh", "-c", "echo last words >&2; exit 3"], "sh failed: last words"),
        (["false"], "false failed: exit status 1"),
        (["/nonexistent/tool"], "tool failed: .*No such file"),
    ],
)
def test_run_tells_why_a_tool_failed(argv, words):
    with pytest.raises(ToolFailed, match=words):
        run(argv)


def test_run_does_not_wait_longer_than_told():
    begun = time.monotonic()
    with pytest.raises(ToolFailed, match=r"no end after 0\.1 s"):
        run(["sleep", "60"], timeout=0.1)
    assert time.monotonic() - begun < 10


def test_messages_are_in_one_language(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert "C.UTF-8" in run(["sh", "-c", "echo $LC_ALL"])


def test_a_child_ends_in_order_or_is_killed():
    with Child(["sleep", "60"], name="sleep") as child:
        assert child.alive()
        assert child.stop() == -signal.SIGTERM
        assert not child.alive()
    with Child(["sh", "-c", "trap '' TERM; echo deaf; sleep 60 & wait; sleep 60"], name="deaf") as child:
        while "deaf" not in child.tail():
            time.sleep(0.01)
        assert child.stop(grace=0.2) == -signal.SIGKILL


def test_a_child_that_cannot_be_held_does_not_live(tmp_path, monkeypatch):
    """Without a descriptor for it nobody would ever end it."""
    monkeypatch.setattr(os, "pidfd_open", lambda _pid: os.open(tmp_path / "none" / "left", os.O_RDONLY))
    with pytest.raises(FileNotFoundError):
        Child(["sh", "-c", f"sleep 0.5; echo lives >{tmp_path}/lives"], name="sh")
    time.sleep(1)
    assert not (tmp_path / "lives").exists()


def test_a_stopped_child_can_be_killed():
    child = Child(["sleep", "60"], name="sleep")
    child.signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert child.kill() == -signal.SIGKILL
    assert time.monotonic() - begun < 5


def test_everything_may_be_repeated_after_the_end():
    child = Child(["sh", "-c", "echo done"], name="sh")
    assert child.wait(10) == 0
    assert child.stop() == child.kill() == child.returncode == 0
    child.signal(signal.SIGTERM)
    assert child.tail() == "done"


def test_the_log_is_appended_to_and_the_tail_is_of_this_run(tmp_path):
    log = tmp_path / "log"
    log.write_text("from before\n")
    child = Child(["sh", "-c", "echo out; echo err >&2"], name="sh", log=log)
    child.wait(10)
    assert child.tail() == "out\nerr"
    child.stop()
    assert log.read_text() == "from before\nout\nerr\n"


def test_wait_raises_timeout_error():
    with Child(["sleep", "60"], name="sleep") as child, pytest.raises(TimeoutError):
        child.wait(0.05)


def test_a_child_of_a_thread_outlives_the_thread():
    """PR_SET_PDEATHSIG follows the thread that forked: a worker's helper must not die with the worker."""
    children = []
    worker = threading.Thread(target=lambda: children.append(Child(["sleep", "60"], name="sleep")))
    worker.start()
    worker.join()
    time.sleep(0.2)
    try:
        assert children[0].alive()
    finally:
        children[0].kill()


@pytest.mark.parametrize("die", [True, False])
def test_a_child_dies_with_us_if_wanted(die, tmp_path):
    """Nothing of ours is left behind when our process is killed."""
    code = f"""
import os, sys
from appliance.process import Child
child = Child(["sleep", "60"], name="sleep", die_with_parent={die})
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    parent = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    handle = os.pidfd_open(int(parent.stdout)) if alive(int(parent.stdout)) else None
    if die:
        for _ in range(100):
            if not alive(int(parent.stdout)):
                return
            time.sleep(0.02)
        pytest.fail("it lives on")
    assert handle is not None
    signal.pidfd_send_signal(handle, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_process_is_alone(tmp_path):
    """The second is told, leaves the first's lock alone, and may come when that is gone."""
    with alone(tmp_path / "lock") as first:
        assert first
        for _ in range(2):
            with alone(tmp_path / "lock") as second:
                assert not second
    with alone(tmp_path / "lock") as third:
        assert third
    with pytest.raises(FileNotFoundError), alone(tmp_path / "nowhere" / "lock"):
        pass


def test_last_words_are_a_sentence_and_no_class_of_ours():
    said = "nbdkit: a line\nnbdkit: python[1]: error:  appliance.errors.Temporary: /mnt/repo does not answer"
    assert last_words(said) == "/mnt/repo does not answer"
    assert last_words("a\nqemu: gone") == "qemu: gone" and last_words("") == ""
