"""The command line with a QEMU behind it: every verb from `init` to `unprotect`, and what bad input says (A12)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.bare import Machine

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64 << 20


class Rewind:
    """The program as its own process, which is what signals and locks are about."""

    def __init__(self, home, uri):
        self.home = home
        self._base = [sys.executable, "-m", "appliance.cli", "--home", str(home), "--connect", uri, "--json"]

    def begin(self, *words):
        return subprocess.Popen(
            [*self._base, *map(str, words)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, process, code=0, timeout=60):
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
        return [json.loads(line) for line in out.splitlines()]

    def __call__(self, *words, code=0):
        return self.end(self.begin(*words), code)


@pytest.fixture
def short():
    """A folder with a short name: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        yield Path(folder)


@pytest.fixture
def machine(short):
    folder = short
    image = folder / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    found = Machine(folder, {"vda": image}, iothread=True)
    try:
        yield found.start()
    finally:
        found.kill()


@pytest.fixture
def model(machine):
    found = bytearray(SIZE)
    machine.write("vda", found, 1 << 20, 3 << 20, 5)
    return found


@pytest.fixture
def rewind(machine, short, model):
    found = Rewind(short / "home", machine.uri)
    found("init")
    found("protect", "bare")
    return found


def ours(machine):
    """Nodes, jobs and bitmaps of ours."""
    found = []
    for node in machine.monitor.execute("query-named-block-nodes"):
        found += [node["node-name"]] if node["node-name"].startswith("rw-") else []
        found += [one["name"] for one in node.get("dirty-bitmaps", ()) if one.get("name", "").startswith("rw-")]
    return found + [job["id"] for job in machine.monitor.execute("query-jobs") if job["id"].startswith("rw-")]


@pytest.mark.timeout(120)
def test_from_protect_to_revert_undo_and_unprotect(machine, rewind, model):
    """P5-02, P5-04, P5-17, P5-18, P5-22, P5-37, by the command line alone."""
    first = rewind("point", "bare", "--label", "one")[-1]
    assert (first["changed_bytes"], first["label"], first["consistency"]) == (3 << 20, "one", "crash")
    machine.write("vda", model, 8 << 20, 1 << 20, 7)
    second = rewind("point", "bare")[-1]
    assert (second["changed_bytes"], second["moved_bytes"], second["parent"]) == (1 << 20, 1 << 20, first["id"])
    assert rewind("diff", "bare", "one", "latest")[-1]["changed_bytes"] == 1 << 20

    plan = rewind("revert", "bare", "--to", "one", "--dry-run")[-1]
    assert (plan["type"], plan["changed_bytes"], plan["extents"]) == ("revert-plan", 1 << 20, 1)
    assert machine.same("vda", 8 << 20, 1 << 20, 7)

    done = rewind("revert", "bare", "--to", "one", "--yes")[-1]
    assert (done["state"], done["mode"], done["changed_bytes"]) == ("done", "plain", 1 << 20)
    assert machine.same("vda", 8 << 20, 1 << 20, 0) and machine.same("vda", 1 << 20, 3 << 20, 5)

    back = rewind("undo", "bare", "--instant", "--yes")[-1]
    assert (back["state"], back["verb"], back["point"]) == ("done", "undo", done["safety_point"])
    assert machine.same("vda", 8 << 20, 1 << 20, 7)

    found = rewind("points", "bare")
    assert found[-1]["timelines"] >= 2
    assert not [one for one in ours(machine) if not one.startswith("rw-") or one.startswith(("rw-ep", "rw-rv"))]
    assert rewind("check", "--read-data")[-1]["problems"] == 0
    assert rewind("unprotect", "bare")[-1]["points_kept"] == found[-1]["points"]
    assert ours(machine) == []


@pytest.mark.timeout(90)
def test_an_interrupted_point_harms_nobody(machine, rewind, model):
    """Ctrl-C puts everything back; what changed is in the next point."""
    process = rewind.begin("point", "bare", "--rate", "4M")
    deadline = time.monotonic() + 20
    while not machine.monitor.execute("query-jobs") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    last = rewind.end(process, 130)[-1]
    assert (last["type"], last["id"]) == ("error", "interrupted")
    assert not [one for one in ours(machine) if one.startswith("rw-ep")]
    assert machine.monitor.execute("query-status")["running"]
    assert rewind("points", "bare")[-1]["points"] == 0
    assert rewind("point", "bare")[-1]["changed_bytes"] == 3 << 20


@pytest.mark.timeout(90)
def test_the_second_waits_or_says_who_is_at_work(machine, rewind, model):
    """A12: two verbs on one domain do not collide."""
    first = rewind.begin("point", "bare", "--rate", "256K")  # the second has to start meanwhile
    lock = next((rewind.home / "domains").glob("*.lock"))
    deadline = time.monotonic() + 20
    while not lock.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    refused = rewind("point", "bare", code=31)[-1]
    assert f"process {first.pid}" in refused["message"]
    waited = rewind.begin("point", "bare", "--wait", "60")
    taken = [rewind.end(one)[-1] for one in (first, waited)]
    assert taken[1]["parent"] == taken[0]["id"]


@pytest.mark.timeout(90)
def test_the_daemon_takes_points_by_the_clock(machine, rewind, model):
    """P5-23: crash-consistent points every n seconds; SIGTERM ends it cleanly."""
    rewind("protect", "bare", "--every", "2s")
    daemon = rewind.begin("daemon")
    second = None
    try:
        seen = [json.loads(daemon.stdout.readline()) for _ in range(3)]
        second = rewind("daemon", code=31)[-1]
    finally:
        daemon.send_signal(signal.SIGTERM)
    out, err = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, err
    assert [one["event"] for one in seen] == ["started", "point", "point"]
    assert json.loads(out.splitlines()[-1])["event"] == "stopped"
    assert str(daemon.pid) in second["message"]
    points = [one for one in rewind("points", "bare") if one["type"] == "point"]
    assert {one["reason"] for one in points} == {"schedule"}


def test_status_names_the_disks_that_no_point_holds(libvirt_uri, libvirt_images, short):
    """P5-39: a disk that came later and cannot be captured, one that went, one that nobody protects."""
    from tests.support.libvirt import virsh

    def define(disks):
        (short / "some.xml").write_text(f"""
            <domain type='qemu'><name>cli-some</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>{uuid}
            <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{disks}</devices></domain>""")
        virsh("define", str(short / "some.xml"))

    def local(target):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", libvirt_images / target, str(SIZE)], check=True)
        return f"""<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
            <source file='{libvirt_images / target}'/><target dev='{target}' bus='virtio'/></disk>"""

    far = """<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd' name='pool/far'>
        <host name='ceph' port='6789'/></source><target dev='vdc' bus='virtio'/></disk>"""
    uuid, vda, vdb = "", local("vda"), local("vdb")
    define(vda + vdb)
    uuid = f"<uuid>{virsh('domuuid', 'cli-some').stdout.strip()}</uuid>"
    rewind = Rewind(short / "home", libvirt_uri)
    try:
        rewind("init")
        rewind("protect", "cli-some")
        assert rewind("status", "cli-some")[-1]["notes"] == []
        define(vda + vdb + far)
        (note,) = rewind("status", "cli-some", code=1)[-1]["notes"]
        assert note.startswith("disk vdc cannot be captured: ") and len(note) > 40
        rewind("protect", "cli-some", "--disk", "vda")
        assert rewind("status", "cli-some")[-1]["notes"] == ["not protected: vdb, vdc"]
        define(vdb)
        found = rewind("status", "cli-some", code=1)[-1]["notes"]
        assert found == ["disk vda is protected and not there any more", "not protected: vdb"]
        rewind("unprotect", "cli-some")
        define(vda + vdb)
        rewind("protect", "cli-some")
        (libvirt_images / "vdb").unlink()
        (note,) = rewind("status", "cli-some")[-1]["notes"]
        assert "vdb" in note and "No such file" in note
        assert rewind("unprotect", "cli-some")[-1]["points_kept"] == 0
        assert [one for one in rewind("status") if one["type"] == "domain-status"] == []
    finally:
        virsh("undefine", "cli-some", check=False)


@pytest.mark.timeout(60)
def test_bad_input_with_a_hypervisor_that_answers(machine, rewind, model):
    """A12: one sentence, a hint, its exit code."""
    rewind("point", "bare", "--label", "one")
    revert = ("revert", "bare", "--to")
    cases = [
        (("point", "nobody"), 12, "'nobody'"),
        (("protect", "nobody"), 12, "'nobody'"),
        (("protect", "bare", "--disk", "vdz"), 13, "vda"),
        ((*revert, "one", "--disk", "vdz", "--yes"), 13, "vda"),
        (("point", "bare", "--quiesce", "require"), 14, "agent"),
        ((*revert, "nonsense", "--yes"), 41, "nonsense"),
        ((*revert, "2020-01-01", "--yes"), 42, "2020-01-01"),
        ((*revert, "one"), 56, "confirmed"),
        (("undo", "bare", "--yes"), 52, "bare"),
        (("resume", "bare"), 53, "bare"),
        (("restore", "bare", "--at", "one", "--into", rewind.home / "x", "--name", "new"), 15, "new"),
    ]
    for words, code, text in cases:
        last = rewind(*words, code=code)[-1]
        assert (last["type"], last["exit_code"]) == ("error", code), words
        assert text in last["message"], last
        assert not last["message"].endswith(".")
    assert not [one for one in ours(machine) if one.startswith(("rw-ep", "rw-rv"))]
    assert machine.monitor.execute("query-status")["running"]


@pytest.mark.timeout(60)
def test_doctor_names_the_build_that_endangers_guests(machine, rewind):
    """doctor knows which QEMU aborts a guest with an iothread."""
    found = rewind("doctor", "bare", code=1 if _endangered(machine) else 0)
    text = " ".join(one.get("finding", "") for one in found)
    assert "vda" in text
    assert ("aborts the guest" in text) == _endangered(machine)


def _endangered(machine):
    version = machine.monitor.execute("query-version")["qemu"]
    return (version["major"], version["minor"]) == (7, 2)  # later ones have no iothread here


@pytest.mark.timeout(60)
def test_a_full_disk_is_told_and_harms_nobody(machine, short, model):
    """A12: no space: the repository is on a full file system."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    small = short / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        other = Rewind(short / "other", machine.uri)
        other("init", "--repository", str(small / "repository"))
        other("protect", "bare")
        noise = short / "noise"
        noise.write_bytes(os.urandom(4 << 20))
        machine.hmp("vda", f"write -s {noise} 16M 4M")
        process = other.begin("point", "bare")
        out, err = process.communicate(timeout=50)
        last = json.loads(out.splitlines()[-1])
        assert process.returncode in (21, 37), (out, err)
        assert last["type"] == "error" and last["hint"]
        assert not [one for one in ours(machine) if one.startswith("rw-ep")]
        assert machine.monitor.execute("query-status")["running"]
        other("unprotect", "bare")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.timeout(150)
def test_a_new_domain_elsewhere(libvirt_uri, libvirt_images, short):
    """P0-06, P5-40: a whole new domain from a point: own disks, own name, own UUID and MAC; the old one untouched."""
    from tests.support.libvirt import virsh

    image = libvirt_images / "old.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 9 2M 1M", image], check=True, stdout=subprocess.DEVNULL)
    (short / "old.xml").write_text(f"""
        <domain type='qemu'><name>cli-old</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>
        <target dev='vda' bus='virtio'/></disk>
        <serial type='unix'><source mode='bind' path='{short}/serial'/><log file='{short}/log'/></serial>
        <graphics type='vnc' socket='{short}/vnc'/>
        <interface type='user'><mac address='52:54:00:aa:bb:cc'/></interface></devices></domain>""")
    virsh("define", str(short / "old.xml"))
    rewind = Rewind(short / "home", libvirt_uri)
    try:
        rewind("init")
        assert rewind("protect", "cli-old")[-1]["disks"] == ["vda"]
        point = rewind("point", "cli-old")[-1]
        assert (point["consistency"], point["changed_bytes"]) == ("offline", 1 << 20)
        refused = rewind("restore", "cli-old", "--at", "latest", "--into", libvirt_images, "--name", "cli-old", code=35)
        assert "cli-old" in refused[-1]["message"]
        made = rewind("restore", "cli-old", "--at", "latest", "--into", libvirt_images, "--name", "cli-new")[-1]
        assert made["defined"]
        assert [one.split(":")[0] for one in made["left_out"]] == ["serial 0", "serial 0", "graphics vnc"]
        compared = subprocess.run(["qemu-img", "compare", image, made["files"][0]], capture_output=True, text=True)
        assert "identical" in compared.stdout
        new, old = virsh("dumpxml", "cli-new").stdout, virsh("dumpxml", "cli-old").stdout
        assert made["files"][0] in new and "52:54:00:aa:bb:cc" not in new and f"{short}/" not in new
        assert virsh("domuuid", "cli-new").stdout != virsh("domuuid", "cli-old").stdout and str(image) in old
        states = {
            one["domain"]: one["protected"] for one in rewind("status", "--all") if one["type"] == "domain-status"
        }
        assert states["cli-old"] and not states["cli-new"]
        rewind("unprotect", "cli-old")
    finally:
        for name in ("cli-old", "cli-new"):
            virsh("undefine", name, check=False)


@pytest.mark.timeout(150)
def test_a_lost_domain_comes_back_as_itself(libvirt_uri, libvirt_images, short):
    """P5-40: undefined and its disk gone, restored under its name it has its UUID, and history goes on from there."""
    from tests.support.libvirt import virsh

    image = libvirt_images / "lost.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    (short / "lost.xml").write_text(f"""
        <domain type='qemu'><name>cli-lost</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>
        <target dev='vda' bus='virtio'/></disk></devices></domain>""")
    virsh("define", str(short / "lost.xml"))
    uuid = virsh("domuuid", "cli-lost").stdout
    rewind = Rewind(short / "home", libvirt_uri)
    try:
        rewind("init")
        rewind("protect", "cli-lost")
        points = []
        for byte in (1, 2):
            subprocess.run(["qemu-io", "-c", f"write -P {byte} 2M 1M", image], check=True, stdout=subprocess.DEVNULL)
            points.append(rewind("point", "cli-lost")[-1])
        virsh("undefine", "cli-lost")
        image.unlink()
        assert "restore cli-lost" in rewind("point", "cli-lost", code=12)[-1]["hint"]
        place = ("--into", libvirt_images, "--name", "cli-lost")
        assert rewind("restore", "cli-lost", "--at", points[0]["id"], *place)[-1]["defined"]
        assert virsh("domuuid", "cli-lost").stdout == uuid
        after = rewind("point", "cli-lost")[-1]
        assert after["parent"] == points[0]["id"] and after["timeline"] != points[0]["timeline"]
        assert rewind("diff", "cli-lost", points[0]["id"], after["id"])[-1]["changed_bytes"] == 0
        assert rewind("diff", "cli-lost", points[1]["id"], after["id"])[-1]["changed_bytes"] == 1 << 20
    finally:
        virsh("undefine", "cli-lost", check=False)
