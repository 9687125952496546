"""The block-graph ground and the healing decision, on graphs written down here: no QEMU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from appliance.capture import heal
from appliance.capture.heal import Mode
from appliance.capture.protection import DiskState
from appliance.errors import DomainBusy, LeftPaused, MonitorError
from appliance.hypervisor.base import Disk
from appliance.hypervisor.graph import base, nodes
from appliance.hypervisor.graph.nodes import Bitmap, Graph, Node
from appliance.hypervisor.graph.survey import device_id, survey

PREFIX = "rw-0badcafe-"


def bitmap(generation, recording=True, **flags):
    values = {"persistent": True, "inconsistent": False, "busy": False, "dirty": 0, "granularity": 65536, **flags}
    return Bitmap(f"{PREFIX}{generation}", recording, **values)


def image(name, path, *bitmaps, backing="", size=1 << 20):
    children = {"backing": backing} if backing else {}
    return Node(name, "qcow2", size, str(path), False, False, {}, {one.name: one for one in bitmaps}, children)


@pytest.fixture
def files(tmp_path):
    """A function that makes an image file and gives its path."""

    def make(name):
        path = tmp_path / name
        path.write_bytes(name.encode())
        return path

    return make


DISK = Disk(target="vda", source="", format="qcow2", size=1 << 20, node="top", storage="top", persistent=True)


def graph(*nodes):
    return Graph({node.name: node for node in nodes}, {})


def state(chain, generation=3):
    """As of a point taken on this chain."""
    return heal.state_of(chain, DISK, generation)


def decide(now, known, has_base=True, untouched=False):
    return heal.decide(now, DISK, PREFIX, known, has_base, untouched)


def test_first_point_is_full(files):
    plan = decide(graph(image("top", files("a"))), None, has_base=False)
    assert (plan.mode, plan.generation, plan.reason) == (Mode.FULL, 0, "")


def test_good_bitmap_is_incremental(files):
    """P5-02: one bitmap, the usual case."""
    now = graph(image("top", files("a"), bitmap(3)))
    plan = decide(now, state(now))
    assert plan.mode is Mode.INCREMENTAL
    assert plan.take == (("top", f"{PREFIX}3"),)
    assert plan.before == (f"{PREFIX}3",)
    assert plan.generation == 4


def test_failed_epoch_leaves_a_union(files):
    """P5-03: died between the freeze and the record; both generations are taken, the next one is new."""
    now = graph(image("top", files("a"), bitmap(3, recording=False), bitmap(4)))
    plan = decide(now, state(now))
    assert set(plan.take) == {("top", f"{PREFIX}3"), ("top", f"{PREFIX}4")}
    assert plan.before == (f"{PREFIX}4",)
    assert plan.generation == 5


def test_older_generations_are_garbage(files):
    now = graph(image("top", files("a"), bitmap(2, recording=False), bitmap(3)))
    assert decide(now, state(now)).take == (("top", f"{PREFIX}3"),)


@pytest.mark.parametrize(
    ("bitmaps", "words"),
    [
        ((), "no bitmap"),
        ((bitmap(3, recording=False, inconsistent=True),), "inconsistent"),
        ((bitmap(2),), "older state"),
        ((bitmap(3, recording=False, inconsistent=True), bitmap(4)), "cannot be used"),
        ((bitmap(4),), "is gone"),
        ((bitmap(3, recording=False),), ""),
    ],
)
def test_anything_else_is_compared(files, bitmaps, words):
    """P5-10, P5-12: lost, broken, put back."""
    known = state(graph(image("top", files("a"), bitmap(3))))
    plan = decide(graph(image("top", files("a"), *bitmaps)), known)
    assert plan.mode is Mode.COMPARE
    assert words in plan.reason
    assert plan.reason.startswith("vda: ")
    assert plan.take == ()


def test_snapshot_takes_the_union_over_the_chain(files):
    """P5-08: libvirt copied the recording bitmap onto the new overlay."""
    old = image("top", files("a"), bitmap(3), backing="base")
    below = image("base", files("base"))
    known = state(graph(old, below))
    now = graph(image("top", files("b"), bitmap(3), backing="old"), replace(old, name="old"), below)
    plan = decide(now, known)
    assert plan.mode is Mode.INCREMENTAL
    assert plan.take == (("top", f"{PREFIX}3"), ("old", f"{PREFIX}3"))
    assert plan.before == (f"{PREFIX}3",)


def test_snapshot_without_a_copied_bitmap_is_compared(files):
    old = image("top", files("a"), bitmap(3))
    now = graph(image("top", files("b"), backing="old"), replace(old, name="old"))
    assert decide(now, state(graph(old))).mode is Mode.COMPARE


def test_commit_into_a_known_image_is_incremental(files):
    """P5-08: overlay committed into its backing file, which then has its bits."""
    below = image("base", files("base"), bitmap(3))
    known = state(graph(image("top", files("a"), bitmap(3), backing="base"), below))
    plan = decide(graph(replace(below, name="top")), known)
    assert plan.mode is Mode.INCREMENTAL


def test_pulled_or_copied_image_is_compared(files):
    """P5-08: after blockpull or blockcopy the image of the last point is gone, and its bits with it."""
    known = state(graph(image("top", files("a"), bitmap(3))))
    plan = decide(graph(image("top", files("c"), bitmap(3))), known)
    assert plan.mode is Mode.COMPARE
    assert "not in the chain" in plan.reason


def test_changed_backing_image_is_compared(files):
    """P5-12: somebody wrote to an image below."""
    path = files("base")
    now = graph(image("top", files("a"), bitmap(3), backing="base"), image("base", path))
    known = state(now)
    assert decide(now, known).mode is Mode.INCREMENTAL
    path.write_bytes(b"changed")
    os.utime(path, ns=(1, 1))
    assert decide(now, known).mode is Mode.COMPARE


def test_untouched_image_is_not_read(files):
    """P5-09: shut off, and nobody wrote since."""
    now = graph(image("top", files("a")))
    assert decide(now, state(now), untouched=True).mode is Mode.UNCHANGED
    assert decide(now, state(now), untouched=False).mode is Mode.COMPARE


def test_device_id():
    assert device_id("/machine/peripheral/virtio-disk0/virtio-backend") == "virtio-disk0"
    assert device_id("scsi0-0-0-0") == "scsi0-0-0-0"
    assert device_id("/machine/peripheral-anon/device[0]") == ""


class FakeMonitor:
    """A guest with one device; `refuse` names what QEMU refuses, with `(command, value)` for the value of qom-set."""

    domain = "fake"
    storage_daemon = False

    def __init__(self, refuse=(), status="running"):
        self.refuse = set(refuse)
        self.status = status
        self.drive = "own"
        self.nodes = {"own"}
        self.said = []

    def execute(self, command, /, **arguments):
        self.said.append(command)
        if command in self.refuse or (command, arguments.get("value")) in self.refuse:
            raise MonitorError(domain=self.domain, command=command, reason="refused")
        return getattr(self, command.replace("-", "_"), lambda **_: [])(**arguments)

    def query_status(self):
        return {"status": self.status, "running": self.status == "running"}

    def stop(self):
        self.status = "paused"

    def cont(self):
        assert not self.drive.startswith("rw-hole"), "resumed on a hole"
        self.status = "running"

    def qom_get(self, **_):
        return self.drive

    def qom_set(self, value, **_):
        assert value != self.drive, "QEMU aborts"
        assert value in self.nodes
        self.drive = value

    def blockdev_add(self, node_name, **_):
        self.nodes.add(node_name)

    def blockdev_del(self, node_name):
        assert node_name != self.drive
        self.nodes.discard(node_name)

    def query_named_block_nodes(self, **_):
        return [{"node-name": n, "drv": "qcow2", "ro": False, "children": []} for n in self.nodes]

    def query_block(self):
        return [{"qdev": "vda", "inserted": {"node-name": self.drive}}]


FAKE_DISK = Disk(target="vda", source="", format="qcow2", size=512, node="own", device="vda")


@pytest.mark.parametrize("status", ["running", "paused"])
def test_pause_restores(status):
    monitor = FakeMonitor(status=status)
    with base.paused(monitor) as pause:
        assert monitor.status == "paused"
    assert monitor.status == status
    assert pause.found_running == (status == "running")


@pytest.mark.parametrize("status", ["inmigrate", "finish-migrate", "save-vm"])
def test_domain_in_transit_is_left_alone(status):
    monitor = FakeMonitor(status=status)
    with pytest.raises(DomainBusy), base.paused(monitor):
        pass
    assert monitor.status == status
    assert "stop" not in monitor.said


def test_never_resumed_on_a_hole():
    """P5-02: QEMU refuses to take the device back; the guest stays paused and the error says so."""
    monitor = FakeMonitor(refuse=[("qom-set", "new"), ("qom-set", "own")])
    with pytest.raises(LeftPaused), base.paused(monitor):
        base.swap(monitor, FAKE_DISK, lambda: "new")
    assert monitor.status == "paused"
    assert monitor.drive.startswith("rw-hole")


def test_hole_that_nobody_reported_is_noticed():
    monitor = FakeMonitor()
    with pytest.raises(LeftPaused), base.paused(monitor):
        base.make_hole(monitor, FAKE_DISK)
        base.attach(monitor, "vda", base.hole_name(FAKE_DISK))
        raise ZeroDivisionError
    assert monitor.status == "paused"


def test_failed_build_puts_back():
    monitor = FakeMonitor()
    with base.paused(monitor), pytest.raises(ZeroDivisionError):
        base.swap(monitor, FAKE_DISK, lambda: 1 // 0)
    assert (monitor.drive, monitor.nodes, monitor.status) == ("own", {"own"}, "running")


def test_attach_looks_first():
    monitor = FakeMonitor()
    base.attach(monitor, "vda", "own")
    assert "qom-set" not in monitor.said


class TappedMonitor(FakeMonitor):
    """The device sits on a whole tap; only the place below it may change."""

    def __init__(self, **options):
        super().__init__(**options)
        self.place = "own"
        self.drive = "rw-tpg-vda"
        self.nodes |= {"rw-tpg-vda", "rw-tpm-vda", "rw-tpf-vda"}

    def below(self):
        return {"rw-tpg-vda": ("file", "rw-tpm-vda"), "rw-tpm-vda": ("backing", "rw-tpf-vda"),
                "rw-tpf-vda": ("file", self.place)}  # fmt: skip

    def cont(self):
        assert not self.place.startswith("rw-hole"), "resumed on a hole"
        super().cont()

    def qom_set(self, **_):
        raise AssertionError("the device was taken off the tap")

    def blockdev_reopen(self, options):
        (one,) = options
        assert one["node-name"] == "rw-tpf-vda" and one["throttle-group"] == "rw-tpt-vda"
        assert (one["driver"], one["discard"]) == ("throttle", "unmap"), "what is not said again is lost"
        assert one["file"] in self.nodes
        self.place = one["file"]

    def blockdev_del(self, node_name):
        assert node_name != self.place
        self.nodes.discard(node_name)

    def x_debug_query_block_graph(self):
        names = sorted(self.nodes | {self.place})
        edges = [{"parent": names.index(top), "name": edge, "child": names.index(child)}
                 for top, (edge, child) in self.below().items()]  # fmt: skip
        return {"nodes": [{"id": number, "name": name} for number, name in enumerate(names)], "edges": edges}

    def query_named_block_nodes(self, **_):
        drivers = {"rw-tpg-vda": "throttle", "rw-tpm-vda": "mirror_top", "rw-tpf-vda": "throttle"}
        found = []
        for name in self.nodes:
            below = [{"child": edge, "node-name": child} for edge, child in [self.below().get(name, ("", ""))] if edge]
            found.append({"node-name": name, "drv": drivers.get(name, "qcow2"), "ro": False, "children": below})
        return found


def test_place_changes_below_the_tap():
    """P5-23: what an epoch or a revert puts under the device goes under the tap, which stays."""
    monitor = TappedMonitor()
    assert base.attached(monitor, "vda") == "own"
    monitor.nodes.add("new")
    with base.paused(monitor):
        base.swap(monitor, FAKE_DISK, lambda: "new")
    assert (monitor.place, monitor.status) == ("new", "running")
    assert base.nodes.read(monitor).place("vda") == "new"
    assert base.nodes.read(monitor).below_ours("rw-tpg-vda") == "new"


def test_failed_build_puts_back_below_the_tap():
    monitor = TappedMonitor()
    with base.paused(monitor), pytest.raises(ZeroDivisionError):
        base.swap(monitor, FAKE_DISK, lambda: 1 // 0)
    assert (monitor.place, monitor.drive, monitor.status) == ("own", "rw-tpg-vda", "running")


def test_never_resumed_on_a_hole_below_the_tap():
    """P5-02: the hole is not under the device itself, and is seen all the same."""
    monitor = TappedMonitor()
    with pytest.raises(LeftPaused), base.paused(monitor):
        base.make_hole(monitor, FAKE_DISK)
        base.attach(monitor, "vda", base.hole_name(FAKE_DISK))
        raise ZeroDivisionError
    assert monitor.status == "paused"


def test_whole_tap_is_no_leftover_of_an_epoch():
    monitor = TappedMonitor()
    assert base.clean(monitor) == []
    assert (monitor.place, monitor.drive) == ("own", "rw-tpg-vda")
    assert "stop" not in monitor.said


def test_state_survives_json(tmp_path):
    from appliance.capture import protection
    from appliance.capture.protection import Pending, Protection
    from appliance.config import Home

    home = Home(tmp_path)
    home.create()
    kept = {"vda": DiskState(4, ("/a:1", "/b:2"), {"/b:2": "2:3:4"}, "5:6:7")}
    record = Protection("shop", "u-1", "qemu:///system", (), "0badcafe", "t1", 60, "auto", "p1", None, kept,
                        Pending("p2", kept))  # fmt: skip
    protection.save(home, record)
    assert protection.load(home, "u-1") == record
    assert protection.all_records(home) == [record]
    protection.remove(home, "u-1")
    assert protection.load(home, "u-1") is None


class Attached:
    """The monitor of a QEMU of that version with one virtio-blk disk."""

    domain, storage_daemon = "web", False

    def __init__(self, version, iothread):
        self.version, self.iothread = version, iothread

    def execute(self, command, /, **arguments):
        image = {"virtual-size": 1, "filename": "f"}
        node = {"node-name": "top", "drv": "raw", "ro": False, "image": image, "file": "f"}
        if command == "query-block":
            return [{"qdev": "/machine/peripheral/vd0/virtio-backend", "inserted": node}]
        if command == "query-named-block-nodes":
            return [node, {**node, "node-name": "file", "drv": "file"}]
        if command in ("query-block-jobs", "query-jobs"):
            return []
        if command == "x-debug-query-block-graph":
            found = [{"id": n, "type": "block-driver", "name": name} for n, name in ((1, "top"), (2, "file"))]
            return {"nodes": found, "edges": [{"parent": 1, "child": 2, "name": "file"}]}
        if command == "query-version":
            return {"qemu": {"major": self.version, "minor": 0, "micro": 0}}
        assert command == "qom-get", command
        return {"type": "virtio-blk-device", "iothread": self.iothread}.get(arguments["property"], "")


@pytest.mark.parametrize(("version", "refused"), [(7, False), (8, True), (9, True), (10, True), (11, True)])
def test_a_disk_with_an_iothread_is_refused_where_it_could_fall_silent(version, refused):
    """P5-02: no harm to the guest comes first; without an iothread it is the same disk as ever."""
    (disk,) = survey(Attached(version, "/objects/io0"))
    assert disk.iothread
    assert ("iothread" in disk.refusal) == refused
    (disk,) = survey(Attached(version, ""))
    assert not disk.iothread and not disk.refusal


class Fetching(Attached):
    """A disk on the filter of a job, with a revert's view in the graph or not."""

    def __init__(self, *names):
        super().__init__(10, "")
        self.names = ("top", *names)

    def execute(self, command, /, **arguments):
        if command != "query-named-block-nodes":
            return super().execute(command, **arguments)
        image = {"virtual-size": 1, "filename": "f"}
        return [{"node-name": name, "drv": "commit_top", "ro": False, "image": image} for name in self.names]


def test_a_disk_under_a_revert_is_told_from_one_under_a_backup():
    """With the keeper dead the revert never ends by itself: to try again later would be no way on."""
    with pytest.raises(DomainBusy) as revert:
        survey(Fetching("rw-rv-v-vda"))
    assert "a revert of vd0" in revert.value.message and "rewind resume" in revert.value.hint
    with pytest.raises(DomainBusy, match="a backup or another block job works on vd0"):
        survey(Fetching())


class Pulled:
    """The monitor of a QEMU whose block-pull has ended and is dismissed after so many looks."""

    domain, storage_daemon = "web", False

    def __init__(self, looks):
        self.looks = looks

    def execute(self, command, /, **_arguments):
        if command == "query-jobs":
            self.looks -= 1
            return [{"type": "stream", "status": "concluded"}] if self.looks >= 0 else [
                {"type": "stream", "status": "running"}, {"type": "backup", "status": "concluded"},
            ]  # fmt: skip
        assert command == "query-named-block-nodes" and self.looks < 0, "QEMU 7.2 dies of it"
        return [{"node-name": "top"}]


def test_nodes_are_not_listed_while_a_pull_that_has_ended_is_not_dismissed(monkeypatch):
    """P5-02: it has a filter without a child then, and QEMU 7.2 dies of making up a file name for it."""
    assert nodes.all_nodes(Pulled(3)) == [{"node-name": "top"}]
    monkeypatch.setattr(nodes, "_DISMISSED", 0.05)
    with pytest.raises(DomainBusy, match="has ended and is not dismissed"):
        nodes.all_nodes(Pulled(1000))
