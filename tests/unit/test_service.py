"""Locks, sessions and output: what every verb stands on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from appliance.cli.output import Meter, Output
from appliance.config import Home
from appliance.errors import Locked, NotSupported
from appliance.restore.definition import for_new_domain
from appliance.service import locks
from appliance.service.session import Session

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path):
    found = Home(tmp_path / "home")
    found.create()
    return found


def hold(home, purpose="point web", wait=0.0, say=lambda _text: None):
    return locks.hold(home, "u", "web", purpose, wait, say)


def test_one_verb_at_a_time_on_a_domain(home):
    """The second is told who is at work; threads count like processes."""
    with hold(home):
        assert f"process {os.getpid()}" in locks.holder(home, "u")
        with pytest.raises(Locked) as caught, hold(home, "revert web"):
            pass
        assert "rewind point web" in caught.value.message
        with locks.hold(home, "other", "db", "point db", 0, lambda _text: None):
            pass
    assert locks.holder(home, "u") is None
    with hold(home):
        pass


def test_the_second_waits_and_says_for_whom(home):
    said, told, release = [], threading.Event(), threading.Event()

    def say(text):
        said.append(text)
        told.set()

    def other():
        with hold(home, "revert web", wait=20, say=say):
            release.set()

    with hold(home):
        thread = threading.Thread(target=other)
        thread.start()
        assert told.wait(10)
        assert not release.wait(0.3)
        began = time.monotonic()
    thread.join(10)
    assert release.is_set() and time.monotonic() - began < 10
    assert "waiting for `rewind point web`" in said[0]


def test_who_waits_comes_before_who_comes_again(home):
    """A daemon with points that are always late must not keep a person out."""
    stop, got = threading.Event(), threading.Event()

    def daemon():
        while not stop.is_set():
            with hold(home, "point web", wait=30):
                time.sleep(0.05)

    def person():
        with hold(home, "undo web", wait=20):
            got.set()

    threads = [threading.Thread(target=daemon), threading.Thread(target=person)]
    threads[0].start()
    time.sleep(0.1)
    began = time.monotonic()
    threads[1].start()
    assert got.wait(10)
    assert time.monotonic() - began < 3
    stop.set()
    for thread in threads:
        thread.join()


def test_a_holder_that_is_killed_lets_go(home):
    code = (
        "import sys, time; from appliance.config import Home; from appliance.service import locks\n"
        "from pathlib import Path\n"
        "with locks.hold(Home(Path(sys.argv[1])), 'u', 'web', 'point web', 0, print):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(home.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Locked), hold(home):
        pass
    other.kill()
    other.wait()
    with hold(home):
        assert str(os.getpid()) in locks.holder(home, "u")


def test_looking_at_a_lock_refuses_nobody(home):
    """`status` takes the lock for an instant to see whether it is free."""
    stop = threading.Event()
    with hold(home):
        pass

    def look():
        while not stop.is_set():
            locks.holder(home, "u")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            with hold(home):
                pass
    finally:
        stop.set()
        thread.join()


def test_closing_a_session_never_hides_the_first_error(home):
    class Broken:
        def close(self):
            raise OSError("gone")

    session = Session(home)
    session._stack.callback(Broken().close)
    with pytest.raises(KeyError), session:
        raise KeyError("first")
    session._stack.callback(Broken().close)
    with pytest.raises(OSError), session:
        pass


# --- output ---------------------------------------------------------------------------------------------------------


def test_progress_of_a_program_is_json_on_standard_error(capsys):
    output = Output(json=True, progress=True)
    with output.meter("point of web") as meter:
        meter._interval = 0.0
        meter.update(50, 200)
    out, err = capsys.readouterr()
    assert out == ""
    line = json.loads(err.splitlines()[0])
    assert (line["type"], line["what"], line["done"], line["total"]) == ("progress", "point of web", 50, 200)
    assert line["left_seconds"] > 0


@pytest.mark.parametrize(
    "output", [Output(), Output(json=True), Output(quiet=True, progress=True), Output(progress=False)]
)
def test_progress_is_shown_on_a_terminal_or_when_asked_for_only(output, capsys):
    with output.meter("x") as meter:
        meter.update(1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_leaves_the_line_clean(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Output().meter("point of web") as meter:
        meter.update(1 << 30, 4 << 30)
    assert "point of web: 1 GiB of 4 GiB" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_meter_may_be_told_from_any_thread():
    seen = []
    meter = Meter("x", lambda progress, last: seen.append(progress), 0.0)
    threads = [threading.Thread(target=meter.update, args=(number, 10)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meter.close()
    assert len(seen) == 11


# --- a new domain's definition ----------------------------------------------------------------------------------------

XML = """<domain type='kvm' id='7'><name>web</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<os><type>hvm</type><loader>/x</loader><nvram template='/t'>/var/lib/libvirt/nvram/web.fd</nvram></os>
<devices>
<disk type='block' device='disk' snapshot='external'><driver name='qemu' type='raw' discard='unmap'/>
<source dev='/dev/vg/web' index='2'/><backingStore/><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
<disk type='file' device='disk'><source file='/b'/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='sda' bus='sata'/></disk>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='vnet0'/></interface>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
</devices><seclabel type='dynamic' model='apparmor'/></domain>"""


def test_a_new_domain_shares_nothing_with_the_old_one(tmp_path):
    """P5-40: the configuration belongs to the point; two domains of it can run side by side."""
    new, left_out = for_new_domain(XML, "web2", {"vda": (tmp_path / "n.qcow2", "qcow2")}, tmp_path / "n.fd")
    for old in (
        "11111111",
        "/dev/vg/web",
        "web.fd",
        "52:54:00:00:00:01",
        "vnet0",
        "apparmor",
        "id='7'",
        "virtio-disk0",
    ):
        assert old not in new, old
    assert f'file="{tmp_path}/n.qcow2"' in new and 'type="qcow2"' in new and f"{tmp_path}/n.fd" in new
    assert "web2" in new and "br0" in new and "/cd.iso" in new
    assert [one.split(":")[0] for one in left_out] == ["disk vdb", "the TPM's state"]


UNSHARED = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web</name><devices>
<serial type='unix'><source mode='bind' path='/run/mine/serial'/><log file='/var/log/mine' append='off'/></serial>
<serial type='pty'><source path='/dev/pts/3'/></serial>
<console type='unix'><source mode='bind' path='/run/mine/serial'/><target type='serial'/></console>
<parallel type='file'><source path='/var/mine/parallel'/></parallel>
<serial type='tcp'><source mode='bind' host='127.0.0.1' service='4555'/><protocol type='telnet'/></serial>
<channel type='unix'><source mode='bind' path='/run/mine/agent'/><target type='virtio' name='org.qemu.guest_agent.0'/>
</channel>
<channel type='unix'><source path='/var/lib/libvirt/qemu/channel/target/domain-1-mine/x'/>
<target type='virtio' name='x'/></channel>
<channel type='spiceport'><source channel='kept'/><target type='virtio' name='y'/></channel>
<graphics type='vnc' socket='/run/mine/vnc'/>
<graphics type='spice' port='59871' autoport='no'><listen type='socket' socket='/run/mine/spice'/></graphics>
<shmem name='mine'><server path='/run/mine/shmem'/></shmem>
<memory model='nvdimm'><source><path>/var/mine/nvdimm</path></source></memory>
<memory model='dimm'><target><size>1</size></target></memory>
<interface type='vhostuser'><source type='unix' path='/run/mine/net' mode='client'/></interface>
<interface type='bridge'><source bridge='kept0'/></interface>
<hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x3b'/></source></hostdev>
<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/mine'/></backend></tpm>
<filesystem type='mount'><driver type='virtiofs'/><source socket='/run/mine/fs'/><target dir='x'/></filesystem>
<filesystem type='mount'><source dir='/kept/folder'/><target dir='y'/></filesystem>
<disk type='block' device='lun'><source dev='/dev/mine'/><target dev='sdb'/></disk>
<disk type='file' device='floppy'><source file='/var/mine.img'/><target dev='fda'/></disk>
<vsock><cid auto='no' address='59872'/></vsock>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
</devices><qemu:commandline><qemu:arg value='-monitor'/><qemu:arg value='unix:/run/mine/monitor'/></qemu:commandline>
</domain>"""


def test_a_new_domain_takes_no_socket_or_file_from_the_old_one():
    """Started beside it, QEMU would remove the old one's sockets and begin its log anew; what may be shared stays."""
    new, left_out = for_new_domain(UNSHARED, "web2", {})
    for old in ("mine", "59871", "59872", "4555", "telnet", "0x3b"):
        assert old not in new, old
    for kept in ("kept0", "/kept/folder", "'kept'", "/dev/urandom", "guest_agent", 'model="dimm"'):
        assert kept.replace("'", '"') in new
    assert new.count('<serial type="pty"') == 3 and new.count('type="socket"') == 2
    told = "\n".join(left_out)
    for word in (
        "/run/mine/serial", "/var/log/mine", "/var/mine/parallel", "127.0.0.1:4555", "/run/mine/agent", "/run/mine/vnc",
        "/run/mine/spice", "59871", "shmem mine", "/var/mine/nvdimm", "/run/mine/net", "pci 0x0000 0x3b",
        "tpm passthrough", "/run/mine/fs", "disk /dev/mine", "/var/mine.img", "59872", "commandline",
    ):  # fmt: skip
        assert told.count(word) == 1, (word, told)
    assert "domain-1-mine" not in told, "nobody chose it, so nobody misses it"


@pytest.mark.parametrize("text", ["", "{}", "<capabilities/>", "<domain"])
def test_a_point_without_a_definition_cannot_become_a_domain(text):
    with pytest.raises(NotSupported) as caught:
        for_new_domain(text, "web2", {})
    assert "--name" in caught.value.hint


def test_a_bug_without_a_home_is_kept_where_temporary_files_go():
    from appliance.log import keep_traceback

    try:
        raise ValueError("boom")
    except ValueError as error:
        path = keep_traceback(error, None)
    assert path.parent == Path(tempfile.gettempdir())
    assert "boom" in path.read_text()
    path.unlink()
