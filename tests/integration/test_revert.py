"""Reverts from end to end in a real QEMU: real store, real epochs, real view, against a model."""

import contextlib
import signal
import subprocess
import time

import pytest

from appliance.errors import DomainBusy, MonitorError, NothingToResume, NothingToUndo, NotRecoverable, RevertUnderWay
from appliance.hypervisor import connect
from appliance.restore import fence, keeper, precopy, switching
from appliance.restore import intent as intents
from appliance.restore.intent import Phase
from appliance.restore.plan import pair
from appliance.restore.resume import GoneDomain, go_on
from tests.support.revert_bench import Bench


@pytest.fixture
def bench():
    made = []

    def make(**options):
        made.append(Bench(**options).start())
        return made[-1]

    yield make
    for one in made:
        one.close()


def only_bitmaps(b):
    """Whether nothing of a revert or an epoch is left in the graph."""
    return [name for name in b.ours() if name.startswith(("rw-rv", "rw-ep", "rw-hole"))] == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("instant", [False, True])
def test_back_forward_undo(bench, instant):
    """P5-17 P5-18 P5-05 P5-07: back, on a new timeline, forward again, and undone; exact each time."""
    b = bench(targets=("vda", "vdb"))
    b.scribble(40)
    first = b.point()
    b.scribble(15)
    second = b.point()
    b.scribble(10)  # in no point before the revert: the safety point has it
    before = {t: bytes(m) for t, m in b.models.items()}
    result = b.reverter().revert(first, instant=instant)
    assert (result.state, result.mode) == ("done", "instant" if instant else "plain")
    b.now_is(first)
    assert b.reads_right()
    assert only_bitmaps(b)
    b.scribble(10)
    third = b.point()
    assert third.timeline == result.timeline
    assert third.parent == first.id
    back = b.reverter().revert(second, instant=instant)
    b.now_is(second)
    assert b.reads_right()
    undone = b.reverter().undo(instant=instant)
    assert undone.verb == "undo"
    b.now_is(third)
    assert b.reads_right()
    assert b.domain.state().value == "running"
    b.models = {t: bytearray(m) for t, m in before.items()}
    b.reverter().revert(b.repo.point(result.safety_point))
    b.machine.quit()
    assert b.images_equal() == []
    assert back.safety_point != result.safety_point
    timelines = {one.id: one for one in b.repo.timelines(b.uuid)}
    assert timelines[result.timeline].origin == first.id
    assert timelines[result.timeline].parent == first.timeline


def test_an_attempt_that_fails_keeps_the_undo_of_the_revert_before(bench, monkeypatch):
    """P5-05."""
    b = bench()
    b.scribble(20)
    first = b.point()
    b.scribble(20)
    before = {t: bytes(m) for t, m in b.models.items()}
    b.reverter().revert(first)

    def fail(*_):
        raise NotRecoverable(point=first.id, reason="pretended")

    with monkeypatch.context() as patched, pytest.raises(NotRecoverable, match="pretended"):
        patched.setattr(switching, "prepare_patch", fail)
        b.reverter().revert(first)
    assert only_bitmaps(b) and not fence.stands(b.home, b.uuid)
    assert b.reverter().undo().verb == "undo"
    b.models = {t: bytearray(m) for t, m in before.items()}
    assert b.reads_right()


def test_moved_is_what_differs(bench):
    """A3: the view serves the differing 2 KiB and nothing else; what becomes zero is not even asked for."""
    b = bench(kind="raw")
    for chunk in range(0, 200, 2):
        b.machine.write("vda", b.models["vda"], chunk * 65536 + 8192, 4096, 7)
    first = b.point()
    for chunk in range(0, 200, 3):
        b.machine.write("vda", b.models["vda"], chunk * 65536 + 8192, 4096, 9)
    now, then = bytes(b.models["vda"]), b.points[first.id]["vda"]
    differ = [i for i in range(0, b.size, 2048) if now[i : i + 2048] != then[i : i + 2048]]
    to_zero = [i for i in differ if not any(then[i // 65536 * 65536 : i // 65536 * 65536 + 65536])]
    result = b.reverter().revert(first)
    assert result.changed_bytes == len(differ) * 2048
    assert result.moved_bytes == (len(differ) - len(to_zero)) * 2048
    assert len(to_zero) > 20


@pytest.mark.timeout(60)
def test_in_the_background(bench):
    """P5-05 P5-07: the verb returns when the guest runs; nothing else may be done meanwhile; the keeper ends it."""
    b = bench()
    b.scribble(40)
    first = b.point()
    b.scribble(30)
    b.hypervisor.close()
    b.domain = connect(b.uri).domain("bare")
    result = b.reverter().revert(first, instant=True, background=True, rate=1 << 18)
    assert result.state == "pending"
    b.domain.close()  # the keeper needs the monitor
    b.now_is(first)
    assert b.reads_right()
    b.scribble(5)
    with pytest.raises(RevertUnderWay):
        b.reverter().revert(first)
    assert intents.pending(b.home)[0].safety_point == result.safety_point
    monitor, limit = b.machine.monitor, time.monotonic() + 60
    while b.keeper_pid() is not None and not b.intent().ended and time.monotonic() < limit:
        for job in monitor.execute("query-block-jobs"):
            with contextlib.suppress(MonitorError):  # it has just ended
                monitor.execute("block-job-set-speed", device=job["device"], speed=0)
        time.sleep(0.1)
    assert b.wait_ended(60).phase is Phase.DONE
    assert b.reads_right()
    b.machine.quit()
    assert b.images_equal() == []


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_shut_off(bench, kind):
    """P5-17: a domain that is shut off goes the same way through the storage daemon, and back."""
    b = bench(kind=kind, targets=("vda", "vdb"))
    b.scribble(30)
    first = b.point()
    b.scribble(20)
    now = {t: bytes(m) for t, m in b.models.items()}
    b.domain.close()
    b.machine.quit()
    result = b.reverter().revert(first)
    assert (result.state, result.mode) == ("done", "offline")
    b.now_is(first)
    assert b.images_equal() == []
    assert not fence.stands(b.home, b.uuid)
    b.reverter().undo()
    b.models = {t: bytearray(m) for t, m in now.items()}
    assert b.images_equal() == []


@pytest.mark.parametrize("saved", [[True], [False, True]], ids=["before", "between-look-and-fence"])
def test_saved_memory_is_not_given_other_disks(bench, saved):
    """Do no harm: libvirt would resume the old memory over the reverted disks. Refused with nothing changed, and a
    point says that the disks alone are as after a power cut."""
    b = bench()
    b.scribble(20)
    first = b.point()
    b.scribble(10)
    b.domain.close()
    b.machine.quit()
    answers = list(saved)
    b.domain.managed_save = lambda: answers.pop(0) if len(answers) > 1 else answers[0]
    with pytest.raises(DomainBusy, match="saved memory") as caught:
        b.reverter().revert(first)
    assert "`virsh managedsave-remove bare`" in caught.value.hint
    assert b.intent() is None and not fence.stands(b.home, b.uuid)
    assert b.images_equal() == []
    with pytest.raises(DomainBusy, match="saved memory"):
        b.reverter().plan(first)
    second = b.point()
    assert second.consistency.value == "crash" and any("saved memory" in note for note in second.notes)
    answers[:] = [False]
    b.reverter().revert(first)
    answers[:] = [True]
    with pytest.raises(DomainBusy, match="saved memory"):
        b.reverter().undo()


def test_paused_by_its_admin(bench):
    """A domain that was found paused is left paused, at the target."""
    b = bench()
    b.scribble(20)
    first = b.point()
    b.scribble(10)
    b.domain.suspend()
    b.reverter().revert(first, instant=True)
    assert b.domain.state().value == "paused"
    b.domain.resume()
    b.now_is(first)
    assert b.reads_right()


def test_one_disk_of_two(bench):
    """P5-17: the other disk is left as it is; undo touches only the same one."""
    b = bench(targets=("vda", "vdb"))
    b.scribble(30)
    first = b.point()
    b.scribble(20)
    now = {t: bytes(m) for t, m in b.models.items()}
    b.reverter().revert(first, ["vdb"])
    b.now_is(first, ["vdb"])
    b.scribble(5)
    second = b.point()
    assert b.reads_right()
    b.reverter().undo()
    b.models = {"vda": bytearray(b.points[second.id]["vda"]), "vdb": bytearray(now["vdb"])}
    b.machine.quit()
    assert b.images_equal() == []


def test_the_plan_after_a_revert_counts_from_what_it_left(bench):
    """Not from the last point: that is the safety point, on the other side."""
    b = bench()
    b.scribble(20)
    then = b.point()
    b.scribble(20)
    b.point()
    b.reverter().revert(then)
    assert b.reverter().plan(then).changed_bytes == 0
    safety = b.repo.point(b.record().last_point)
    assert b.reverter().plan(safety).changed_bytes > 0
    b.machine.quit()


def test_grown_since(bench):
    """The disk keeps its size, what is new reads as zeroes; a point of the larger disk cannot go onto a smaller one."""
    b = bench(size=(4 << 20) - 1024)
    b.scribble(20, longest=2)
    small = b.point()
    b.size = (6 << 20) - 512
    b.machine.monitor.execute("block_resize", node_name="VDA", size=b.size)
    b.models["vda"] += bytes(b.size - len(b.models["vda"]))
    b.scribble(40, longest=2)
    b.machine.write("vda", b.models["vda"], (4 << 20) - 4096, 65536, 5)
    large = b.point()
    plan = b.reverter().plan(small)
    assert any("has grown" in note for note in plan.notes)
    b.reverter().revert(small)
    b.now_is(small)
    b.models["vda"] += bytes(b.size - len(b.models["vda"]))
    assert b.reads_right()
    b.reverter().revert(large)
    b.now_is(large)
    b.machine.quit()
    assert b.images_equal() == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shut_off", [False, True])
def test_roll_back(bench, shut_off):
    """P5-35: given up in the middle, the domain is as it was before, on its old timeline."""
    b = bench(targets=("vda", "vdb"))
    b.scribble(20)
    first = b.point()
    b.scribble(20)
    before = {t: bytes(m) for t, m in b.models.items()}
    timeline = b.record().timeline
    b.reverter().revert(first, instant=True, background=True, rate=1 << 19)
    b.kill("keeper")
    b.now_is(first)
    b.scribble(5)
    if shut_off:
        b.domain.close()
        b.kill("qemu")
    result = b.reverter().resume(roll_back=True, wait=5)
    assert result.state == "rolled-back"
    assert b.record().timeline == timeline
    b.models = {t: bytearray(m) for t, m in before.items()}
    if not shut_off:
        assert b.domain.state().value == "running"
        assert b.reads_right()
        assert only_bitmaps(b)
        b.scribble(5)
        b.point()
        b.machine.quit()
    assert b.images_equal() == []
    with pytest.raises(NothingToUndo):
        b.reverter().undo()


@pytest.mark.timeout(60)
def test_hung_view(bench):
    """Failure table: a stopped view is killed and replaced; the guest's reads wait no longer than `view_timeout`."""
    b = bench(view_timeout=4.0)
    b.scribble(60)
    first = b.point()
    b.scribble(50)
    b.reverter().revert(first, instant=True, background=True, rate=1 << 18)
    b.domain.close()
    b.now_is(first)
    view = b.view_pid()
    b.kill("view", number=signal.SIGSTOP)
    begun = time.monotonic()
    longest = 0.0
    while time.monotonic() - begun < 5:
        start = time.monotonic()
        assert b.reads_right(1)
        longest = max(longest, time.monotonic() - start)
    print(f"longest read {longest:.2f} s")
    assert longest < 4.0
    assert b.view_pid() != view
    b.domain = connect(b.uri).domain("bare")
    assert keeper.state(b.home, b.uuid)["shows"] == "wanted"


def test_the_image_lock_after_qemu_died(bench):
    """P5-36: when QEMU dies in the middle, nobody opens the half-way disk for writing until the revert has ended; it
    ends even when the hypervisor has forgotten the domain."""
    b = bench()
    b.scribble(20)
    first = b.point()
    b.scribble(20)
    with intents.drive_lock(b.home, b.uuid) as ours:  # nobody else drives: the domain stays half-way
        assert ours
        b.reverter()._begin(first, pair(b.domain, first, ()), False, True, 1 << 18, "revert")
        b.domain.close()
        b.now_is(first)
        b.kill("qemu")
        deadline = time.monotonic() + 10
        while not keeper.state(b.home, b.uuid)["holds"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        write = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(b.machine.disks["vda"])]
        refused = subprocess.run(write, capture_output=True, text=True)
        assert 'Failed to get "write" lock' in refused.stdout + refused.stderr
        assert fence.stands(b.home, b.uuid)
        gone = GoneDomain(b.intent())
        assert go_on(b.home, b.settings, b.uuid, domain=gone).phase is Phase.DONE
    assert b.images_equal() == []
    assert not fence.stands(b.home, b.uuid)


def test_an_error_before_the_switch(bench):
    """Do no harm: when the view cannot be had, nothing has changed and the guest never stopped for good."""
    b = bench()
    b.scribble(20)
    first = b.point()
    b.scribble(10)
    real, keeper._NO_VIEW = keeper._NO_VIEW, 2.0
    try:
        b.home.run(b.uuid).mkdir(exist_ok=True)
        (b.home.run(b.uuid) / "revert.sock").mkdir()  # nothing can listen there
        with pytest.raises(NotRecoverable):
            b.reverter().revert(first)
    finally:
        keeper._NO_VIEW = real
    assert b.intent() is None
    assert b.domain.state().value == "running"
    assert only_bitmaps(b)
    assert b.reads_right()
    assert not fence.stands(b.home, b.uuid)


def test_plan_changes_nothing(bench):
    """P5-22: bytes, extents, seconds and files, by looking only."""
    b = bench(targets=("vda", "vdb"))
    b.scribble(20)
    first = b.point()
    b.machine.write("vda", b.models["vda"], 65536 * 3, 65536 * 2, 9)
    b.machine.write("vda", b.models["vda"], 65536 * 9, 512, 9)
    b.point()
    plan = b.reverter().plan(first, instant=True)
    assert plan.mode == "instant"
    assert [row[0] for row in plan.disks] == ["vda", "vdb"]
    assert plan.changed_bytes == plan.chunks * 65536
    assert plan.extents == 2
    assert str(b.machine.disks["vda"]) in plan.files
    assert b.intent() is None


def test_no_needless_point(bench):
    """When the last point is young only the safety point is taken; when much was written, one before it."""
    b = bench(pause_budget=1 << 20)
    b.scribble(20)
    first = b.point()
    b.machine.write("vda", b.models["vda"], 0, 4096, 3)
    result = b.reverter().revert(first)
    assert [p.reason for p in b.repo.points(b.uuid)] == ["manual", "safety"]
    assert b.repo.point(result.safety_point).parent == first.id
    b.now_is(first)
    b.machine.write("vda", b.models["vda"], 0, 3 << 20, 3)
    b.reverter().revert(first)
    assert [p.reason for p in b.repo.points(b.uuid)] == ["manual", "safety", "before-revert", "safety"]
    b.now_is(first)
    b.machine.quit()
    assert b.images_equal() == []


def test_nothing_to_undo_or_resume(bench):
    """A12: one sentence each."""
    b = bench()
    with pytest.raises(NothingToUndo):
        b.reverter().undo()
    with pytest.raises(NothingToResume):
        b.reverter().resume()


def test_a_guest_that_writes_too_fast_is_not_stopped_for_long(bench, monkeypatch):
    """P5-17: refused before anything is switched; the guest runs on, and what it wrote is in the next point."""
    b = bench(pause_limit=1.5)
    b.scribble(20)
    first = b.point()
    plan = b.reverter().plan(first, instant=True)
    assert any("more than 1.5 s" in note for note in plan.notes)
    monkeypatch.setattr(precopy, "_RATE", 64 << 10)
    real = keeper.ensure

    def written_meanwhile(*args):
        real(*args)
        b.scribble(20)

    with monkeypatch.context() as patched, pytest.raises(DomainBusy, match="pause_limit") as caught:
        patched.setattr(keeper, "ensure", written_meanwhile)
        b.reverter().revert(first, instant=True)
    assert "nothing has changed" in caught.value.hint
    assert only_bitmaps(b) and not fence.stands(b.home, b.uuid) and b.intent() is None
    assert b.domain.state().value == "running" and b.reads_right()
    b.wait_ended()
    monkeypatch.setattr(precopy, "_RATE", 1 << 30)
    b.reverter().revert(first)
    b.now_is(first)
    assert b.reads_right()
