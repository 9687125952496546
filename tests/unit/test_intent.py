"""The intent of a revert: what is durable, who drives."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.config import Home, Settings
from appliance.errors import NothingToResume, RestoreError, RevertUnderWay
from appliance.model import MapRef
from appliance.process import process_key
from appliance.restore import intent as intents
from appliance.restore import keeper
from appliance.restore.drive import Driver
from appliance.restore.intent import DiskIntent, Intent, Phase
from appliance.restore.keeping import Keeper
from appliance.restore.result import come_of
from appliance.restore.retrieval import Retrieval
from appliance.restore.revert import Reverter
from appliance.restore.switching import Switching


def made(**changes):
    """A revert of one disk."""
    disk = DiskIntent(
        "vda", "/d.qcow2", "qcow2", 1 << 20, MapRef(b"\1" * 16, 1 << 20, 5), MapRef(b"", 1 << 20), "P", "O"
    )
    facts = {
        "id": "r1", "domain": "web", "uuid": "u-1", "uri": "qemu:///system", "verb": "revert", "point": "p1",
        "safety_point": "p2",
        "timeline": "t2", "instant": True, "was": "running", "rate": 0, "started": 1.5,
        "repository": "{}",
        "disks": (disk,),
    }  # fmt: skip
    return Intent(**(facts | changes))


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    return home


def test_comes_back_as_saved(home):
    """Every field survives, binary ids included."""
    assert intents.load(home, "u-1") is None
    saved = intents.save(home, made().at(Phase.SWITCHED, notes=("slow",), owner=(64055, 108)))
    assert intents.load(home, "u-1") == saved
    assert intents.pending(home) == [saved]


def test_refuses_until_it_has_ended(home):
    """A point or another revert would be a lie while the disk is half-way."""
    intents.refuse_if_under_way(home, "u-1", "web")
    intents.save(home, made())
    with pytest.raises(RevertUnderWay, match="'web' to p1"):
        intents.refuse_if_under_way(home, "u-1", "web")
    intents.save(home, made().at(Phase.DONE))
    intents.refuse_if_under_way(home, "u-1", "web")
    assert intents.pending(home) == []


def test_discard_leaves_nothing(home):
    """Patches and overlays go with the intent, twice is the same as once."""
    intents.save(home, made())
    (home.revert("u-1") / "patch-vda").write_bytes(b"x")
    intents.discard(home, "u-1")
    intents.discard(home, "u-1")
    assert list(home.revert("u-1").iterdir()) == []


def test_roll_back_ends_with_the_merge():
    """Once the guest's own blocks go into the disk, the patch does not cover all that was written."""
    allowed = {phase for phase in Phase if made().at(phase).may_roll_back}
    assert allowed == {Phase.FENCED, Phase.SWITCHED, Phase.ROLLING_BACK}


def test_one_driver(home):
    """The lock of a killed driver is free at once."""
    code = (
        "import sys, time; from pathlib import Path; from appliance.config import Home\n"
        "from appliance.restore.intent import drive_lock\n"
        "with drive_lock(Home(Path(sys.argv[1])),'u-1') as mine: print(mine, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(home.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    with intents.drive_lock(home, "u-1") as mine:
        assert not mine
    process.kill()
    process.wait()
    with intents.drive_lock(home, "u-1") as mine:
        assert mine


def test_another_version_is_not_guessed_at(home):
    """An intent of another format is left alone."""
    intents.save(home, made())
    path = home.revert("u-1") / "intent.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RestoreError, match="another version"):
        intents.load(home, "u-1")


@pytest.mark.parametrize("text", ["[]", '{"format": 1}', '{"format": 1, "phase": "somewhere", "notes": []}', "null"])
def test_what_is_no_intent_is_one_sentence(home, text):
    """Another home reads it as well, for a domain that may not be its own."""
    folder = home.revert("u-1")
    folder.mkdir(parents=True)
    (folder / "intent.json").write_text(text)
    with pytest.raises(RestoreError, match=r"cannot read|another version"):
        intents.load(home, "u-1")


def test_discard_brings_the_revert_before_back(home):
    """P5-05: what has not begun does not take the place of what can be undone."""
    before = intents.save(home, made(id="before").at(Phase.DONE))
    intents.set_aside(home, "u-1")
    intents.save(home, made(id="after"))
    intents.discard(home, "u-1")
    assert intents.load(home, "u-1").id == before.id
    intents.discard(home, "u-1")
    intents.set_aside(home, "u-1")
    intents.save(home, made())
    intents.discard(home, "u-1")
    assert intents.load(home, "u-1") is None


def test_a_keeper_goes_on_when_the_disk_is_full(home, monkeypatch):
    """P5-14: the view that a guest reads would have nobody, and the images of a dead QEMU no lock."""

    def full(path, _text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    intents.save(home, made())
    kept = Keeper(home, "u-1", Settings())
    monkeypatch.setattr(Path, "write_text", full)
    kept._note()
    assert keeper.state(home, "u-1") == {}
    monkeypatch.undo()
    kept._note()
    assert keeper.state(home, "u-1")["key"] == process_key(os.getpid())


def reverter(home):
    domain = SimpleNamespace(uuid="u-1", name="web")
    return Reverter(home, Settings(), SimpleNamespace(to_json=lambda: "{}"), None, domain)


def ends_while_waited_for(home, monkeypatch, **facts):
    """The keeper drives; the first time that somebody waits for it, it comes to its end."""
    keeper_has = intents.drive_lock(home, "u-1")
    keeper_has.__enter__()

    def wait(_seconds):
        intents.save(home, made(**facts).at(Phase.DONE))
        keeper_has.__exit__(None, None, None)

    monkeypatch.setattr("appliance.restore.revert.time.sleep", wait)


def test_who_waits_for_the_end_of_a_revert_is_told_what_came_of_it(home, monkeypatch):
    """P5-08: the keeper lets go of the wheel when it has ended, and then nothing is left to resume."""
    intents.save(home, made().at(Phase.MERGING))
    ends_while_waited_for(home, monkeypatch)
    assert reverter(home).resume().state == "done"
    # Also when it ended before we came to look.
    assert reverter(home).resume(meant=made().at(Phase.MERGING)).state == "done"
    with pytest.raises(NothingToResume):
        reverter(home).resume()


def test_a_revert_that_came_after_the_one_that_was_meant_is_not_rolled_back():
    later = replace(made().at(Phase.SWITCHED), id="r-2")
    with pytest.raises(NothingToResume) as caught:
        come_of(made().at(Phase.SWITCHED), later, roll_back=True)
    assert "another one" in caught.value.hint
    assert come_of(made().at(Phase.SWITCHED), later, roll_back=False) is None


def test_the_intent_is_there_before_the_fence(home, monkeypatch):
    """Else a death between the two leaves a domain that cannot be started, and nothing for `resume` to end."""
    known = []
    monkeypatch.setattr("appliance.restore.neighbours.announce", lambda _: None)
    monkeypatch.setattr("appliance.restore.switching.make_overlay", lambda *_: None)
    monkeypatch.setattr("appliance.restore.fence.put_up", lambda home, uuid: known.append(intents.load(home, uuid)))
    site = SimpleNamespace(
        home=home, settings=None, spec=None, repo=None, domain=None, settings_file=None, progress=None
    )
    Switching(site, None)._announce(made())
    assert known == [made()]


def test_a_revert_that_ended_before_it_was_rolled_back_can_be_undone(home, monkeypatch):
    intents.save(home, made().at(Phase.SWITCHED))
    ends_while_waited_for(home, monkeypatch)
    with pytest.raises(NothingToResume) as caught:
        reverter(home).resume(roll_back=True, wait=60)
    assert "ended before it could be rolled back" in caught.value.hint and "`rewind undo web`" in caught.value.hint
    intents.save(home, made().at(Phase.SWITCHED))
    ends_while_waited_for(home, monkeypatch, extra={"turned": True})
    assert reverter(home).resume(roll_back=True, wait=60).state == "rolled-back"


def test_who_cannot_roll_back_is_told_which_process_to_end(home, monkeypatch):
    intents.save(home, made().at(Phase.SWITCHED))
    monkeypatch.setattr(keeper, "state", lambda *_: {"key": process_key(os.getpid())})
    monkeypatch.setattr("appliance.restore.revert.time.monotonic", iter([0.0, 1.0]).__next__)
    with intents.drive_lock(home, "u-1"), pytest.raises(RevertUnderWay) as caught:
        reverter(home).resume(roll_back=True)
    assert f"`kill {os.getpid()}`" in caught.value.hint


def test_what_a_killed_keeper_had_moved_is_said_not_to_be_counted(home, monkeypatch):
    """P5-08: 40 MiB had been copied, and the result said that 0 B were."""
    course = intents.Course(home, intents.save(home, made()))
    monkeypatch.setattr(keeper, "ensure", lambda *_: None)
    retrieval = Retrieval(home, Settings(), Path("/nonexistent"), course, lambda *_: None)
    monkeypatch.setattr(keeper, "state", lambda *_: {"key": process_key(os.getpid())})
    retrieval.need_view()
    assert not course.intent.notes
    monkeypatch.setattr(keeper, "state", lambda *_: {"key": "1:0"})
    retrieval.need_view()
    retrieval.need_view()
    course.save(Phase.MERGING)
    (note,) = intents.load(home, "u-1").notes
    assert "not counted" in note


@pytest.mark.parametrize(("instant", "running", "told"), [(False, True, 1), (False, False, 0), (True, True, 0)])
def test_a_guest_that_somebody_let_go_on_was_paused_for_less(home, monkeypatch, instant, running, told):
    """P5-08: the time to its end would be told as a pause."""
    intents.save(home, made())
    driver = Driver(home, Settings(), None, made(instant=instant).at(Phase.MERGING))
    monitor = SimpleNamespace(execute=lambda _command: {"running": running})
    for name in ("_chains", "_still_ours", "_branch"):
        monkeypatch.setattr(driver, name, lambda *_args, **_options: [1])
    monkeypatch.setattr(driver, "_retrieval", SimpleNamespace(merge=lambda *_: None))
    monkeypatch.setattr("appliance.restore.drive.retrieval.complete", lambda *_: None)
    driver._online(monitor)
    assert len([note for note in driver.intent.notes if "paused for less" in note]) == told
