"""The cage of the reader, tried from inside; and what the parent does when the child is not what it should be."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance import secrecy
from appliance.errors import ConfigError, GuestUnreadable
from images.guest import confine, wire
from images.guest.confine import Seccomp
from images.guest.reader import ConfinedTree
from tests.support.guestdisk import FileBlocks, ext4, write_tree
from tests.support.limits import limit

# Each attempt is a way out; what it returns or raises is told. Everything it uses is imported before it goes in.
ATTEMPTS = """
import ctypes, errno, json, mmap, os, resource, signal, socket, sys
from images.guest import wire
from images.guest.confine import Cage, Seccomp, enter

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_ssize_t

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def network(address):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as it:
        it.settimeout(2)
        it.connect(address)

def abstract():
    with socket.socket(socket.AF_UNIX) as it:
        it.connect(chr(0) + NAME)

def unix():
    with socket.socket(socket.AF_UNIX) as it:
        it.connect(SOCKET)

def hog():
    return len(bytearray(4 << 30))

def descriptors():
    held = []
    try:
        while len(held) < 100:
            held.append(os.dup(0))
    finally:
        for one in held:
            os.close(one)

def write(path):
    with open(path, "w") as file:
        file.write("x")

def clone():
    child = libc.syscall(56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child == -1:
        raise OSError(ctypes.get_errno(), "clone")

HOST, NAME, SOCKET, PARENT, MODE = json.loads(sys.argv[1])
attempts = {
    "read a file": lambda: open(HOST).read(),
    "read /etc/passwd": lambda: open("/etc/passwd").read(),
    "look around": lambda: os.listdir("/"),
    "leave by ..": lambda: os.listdir("/../../.."),
    "write to /": lambda: write("/x"),
    "write to /tmp": lambda: write("/tmp/x"),
    "write to the host": lambda: write(HOST),
    "processes": lambda: os.listdir("/proc"),
    "memory of the parent": lambda: open(f"/proc/{PARENT}/mem", "rb"),
    "trace the parent": lambda: call("ptrace", 16, PARENT, 0, 0),
    "trace process 1": lambda: call("ptrace", 16, 1, 0, 0),
    "signal the parent": lambda: os.kill(PARENT, 0),
    "signal anybody": lambda: os.kill(-1, 0),
    "network of the host": lambda: network(("127.0.0.1", PORT)),
    "network outside": lambda: network(("192.0.2.1", 80)),
    "abstract socket": abstract,
    "socket by path": unix,
    "be root": lambda: os.setuid(0),
    "mount": lambda: call("mount", b"none", b"/", b"proc", 0, None),
    "new namespaces": lambda: call("unshare", 0x10020000),
    "a user namespace of a child": clone,
    "other namespaces": lambda: os.open("/proc/1/ns/mnt", os.O_RDONLY),
    "a device": lambda: os.mknod("/x", 0o60600, os.makedev(7, 0)),
    "load a module": lambda: call("syscall", 313, 0, b"", 0),
    "fork": os.fork,
    "run a program": lambda: os.execv("/bin/true", ["true"]),
    "more memory": hog,
    "more descriptors": descriptors,
    "host name": lambda: call("sethostname", b"x", 1),
    "code in memory": lambda: call("mmap", None, 4096, 5, 0x22, -1, 0) ,
    "bpf": lambda: call("syscall", 321, 0, None, 0),
    "devices": lambda: os.listdir("/dev"),
    "write to /usr": lambda: write("/usr/x"),
    "keys": lambda: call("syscall", 250, 0, -3, 1),
}
parent = socket.socket(fileno=int(sys.argv[-1]))
PORT = 9
if MODE in ("programs", "secret"):
    from images.guest.general_child import Order, cage
    shown = os.path.dirname(HOST) + "/shown"
    where = cage(Order(sockets={"vda": SOCKET}, appliance=shown, secret=MODE == "secret"))
else:
    where = Cage(seccomp=Seccomp(MODE))
enter(parent, where)
while True:
    try:
        question, _ = wire.receive(parent)
    except wire.Closed:
        break
    try:
        result = attempts[question["try"]]()
        answer = {"done": repr(result)[:200]}
    except OSError as error:
        answer = {"refused": errno.errorcode.get(error.errno, str(error))}
    except MemoryError:
        answer = {"refused": "MemoryError"}
    wire.send(parent, answer)
"""

# What stops each attempt where there is no seccomp; empty: seccomp alone does.
WALLS = {
    "read a file": "ENOENT", "read /etc/passwd": "ENOENT", "processes": "ENOENT", "memory of the parent": "ENOENT",
    "other namespaces": "ENOENT", "write to /": "EROFS", "write to /tmp": "ENOENT", "write to the host": "ENOENT",
    "a device": "EROFS", "trace the parent": "ESRCH", "trace process 1": "EPERM", "signal the parent": "ESRCH",
    "network of the host": "ENETUNREACH", "network outside": "ENETUNREACH", "abstract socket": "ECONNREFUSED",
    "socket by path": "ENOENT", "be root": "EINVAL", "mount": "EPERM", "fork": "EAGAIN", "run a program": "ENOENT",
    "more memory": "MemoryError", "more descriptors": "EMFILE", "host name": "EPERM", "look around": "",
    "leave by ..": "", "signal anybody": "", "new namespaces": "", "code in memory": "", "keys": "", "bpf": "",
    "load a module": "",
}  # fmt: skip


class Prisoner:
    def __init__(self, folder, mode, secret=False):
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_text("of the host")
        self.secret.chmod(0o666)
        folder.chmod(0o777)
        self._listening = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.socket()]
        name = f"rewind-test-{folder}"
        self._listening[0].bind("\0" + name)
        path = folder / "listen.sock"
        self._listening[1].bind(str(path))
        path.chmod(0o777)
        self._listening[2].bind(("127.0.0.1", 0))
        for one in self._listening:
            one.listen()
        (folder / "shown").mkdir()
        program = folder / "attempts.py"
        port = self._listening[2].getsockname()[1]
        program.write_text(ATTEMPTS.replace("PORT = 9", f"PORT = {port}"))
        told = json.dumps([str(self.secret), name, str(path), os.getpid(), "secret" if secret else mode.value])
        self.child, self.socket = confine.start([sys.executable, str(program), told], name="prisoner")

    def attempt(self, what):
        self.socket.settimeout(20)
        wire.send(self.socket, {"try": what})
        return wire.receive(self.socket)[0]

    def close(self):
        self.socket.close()
        self.child.kill()
        for one in self._listening:
            one.close()


@pytest.fixture(scope="module")
def prisoner(tmp_path_factory):
    one = Prisoner(tmp_path_factory.mktemp("cage"), Seccomp.READER)
    yield one
    one.close()


@pytest.fixture(scope="module")
def without_seccomp(tmp_path_factory):
    one = Prisoner(tmp_path_factory.mktemp("cage"), Seccomp.NONE)
    yield one
    one.close()


@pytest.mark.parametrize("what", WALLS)
def test_there_is_no_way_out(prisoner, what):
    """I5, P6-04: the reader tries to leave its cage."""
    refused = "MemoryError" if what == "more memory" else "EPERM"
    assert prisoner.attempt(what) == {"refused": refused}
    assert prisoner.secret.read_text() == "of the host"


@pytest.mark.parametrize("what", [what for what, error in WALLS.items() if error])
def test_there_is_no_way_out_by_the_namespaces_alone(without_seccomp, what):
    """I5: no wall is the only one."""
    assert without_seccomp.attempt(what) == {"refused": WALLS[what]}
    assert without_seccomp.secret.read_text() == "of the host"


# libguestfs and QEMU need programs and files; what they may not is the same.
WIDER = {
    **{what: error for what, error in WALLS.items() if error}, "read /etc/passwd": "", "fork": "", "run a program": "",
    "more memory": "", "more descriptors": "", "write to /tmp": "", "trace the parent": "EPERM", "a device": "EPERM",
    "new namespaces": "EPERM", "bpf": "EPERM", "keys": "EPERM", "load a module": "EPERM",
    "a user namespace of a child": "EPERM",
}  # fmt: skip


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    one = Prisoner(tmp_path_factory.mktemp("cage"), Seccomp.PROGRAMS)
    yield one
    one.close()


@pytest.mark.parametrize("what", [what for what, error in WIDER.items() if error])
def test_there_is_no_way_out_of_the_cage_of_libguestfs(wider, what):
    """I5."""
    assert wider.attempt(what) == {"refused": WIDER[what]}
    assert wider.secret.read_text() == "of the host"


def test_what_the_cage_of_libguestfs_shows(wider):
    """No /dev/kvm, no home, no /etc but for two files; and nothing that could be written but its own memory."""
    shown = wider.attempt("look around")["done"]
    assert sorted(json.loads(shown.replace("'", '"'))) == sorted(
        ["usr", "etc", "dev", "appliance", "disks", "bin", "sbin", "lib", "lib64", "var", "tmp"]
    )
    devices = json.loads(wider.attempt("devices")["done"].replace("'", '"'))
    assert sorted(devices) == ["null", "random", "urandom", "zero"]
    assert wider.attempt("write to /usr") == {"refused": "EROFS"}


def test_there_is_nothing_inside(without_seccomp):
    """What `..` of the root leads to is the root, and that is empty."""
    assert without_seccomp.attempt("look around") == {"done": "[]"}
    assert without_seccomp.attempt("leave by ..") == {"done": "[]"}


def test_it_is_nobody_without_a_capability(prisoner):
    """Seen from outside, in what the kernel says of the process."""
    status = dict(line.split(":\t", 1) for line in _inside(prisoner.child.pid).splitlines() if ":\t" in line)
    assert set(status["Uid"].split() + status["Gid"].split()) == {"65534"}
    assert {status[f"Cap{kind}"] for kind in ("Prm", "Eff", "Bnd", "Inh", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "")
    assert status["NSpid"].split()[-1] == "1"


def _inside(outer):
    with open(f"/proc/{int(_children(outer))}/status") as file:
        return file.read()


def test_scratch_of_a_cage_with_a_passphrase_is_never_in_swap(wider, tmp_path):
    """I7: the appliance's own disk is written to /tmp, and a tmpfs may go to swap; a ramfs has no way there."""
    assert _kind_of_tmp(wider) == "tmpfs"
    one = Prisoner(tmp_path, Seccomp.PROGRAMS, secret=True)
    try:
        assert _kind_of_tmp(one) == "ramfs"
        assert one.attempt("write to /tmp") == {"done": "None"}
    finally:
        one.close()


def _kind_of_tmp(prisoner):
    with open(f"/proc/{int(_children(prisoner.child.pid))}/mountinfo") as file:
        (kind,) = [line.partition(" - ")[2].split()[0] for line in file if line.split()[4] == "/tmp"]
    return kind


def test_nothing_of_our_environment_gets_in(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    one = Prisoner(tmp_path, Seccomp.READER)
    try:
        with open(f"/proc/{one.child.pid}/environ") as file:
            assert "secret" not in file.read()
    finally:
        one.close()


def test_it_ends_with_its_parent(tmp_path):
    """Both processes, also when the parent is killed."""
    image = ext4(tmp_path / "image", write_tree(tmp_path / "source", {"/etc/x": "x"}))
    script = f"""
import sys, time
from pathlib import Path
from images.guest.sources import open_disks
from images.guest.reader import ConfinedTree
with open_disks({{"vda": {str(image)!r}}}, Path({str(tmp_path)!r})) as disks, ConfinedTree.fast(disks) as tree:
    print(tree.pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        outer = int(parent.stdout.readline())
        inner = int(_children(outer))
        parent.kill()
    _wait_gone(outer)
    _wait_gone(inner)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read()


def _wait_gone(pid):
    deadline = time.monotonic() + limit(20)
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- a child that is not what it should be ---

BEGIN = """
import json, os, socket, struct, sys, time
from images.guest import wire
from images.guest.confine import Cage, enter
parent = socket.socket(fileno=int(sys.argv[-1]))
enter(parent, Cage())
wire.receive(parent)
"""
BAD = {
    "ends": ("os._exit(3)", "its reader ended: status 3"),
    "crashes": ("raise RuntimeError('broken')", "its reader ended: RuntimeError: broken"),
    "hangs": ("time.sleep(600)", "no answer within 1 s"),
    # A limit of each recv would begin anew with every byte; and with every message that asks for something.
    "drips": ("parent.sendall(struct.pack('>II', 600, 0))\nwhile 1: parent.sendall(b' '); time.sleep(0.05)",
              "no answer within 1 s"),
    "drips parts": ("while 600: wire.send(parent, {'part': True}); time.sleep(0.01)", "no answer within 1 s"),
    "asks for ever": ("while 600: wire.send(parent, {'need': 'vda', 'offset': 0, 'length': 1}); wire.receive(parent)",
                      "no answer within 1 s"),
    "noise": ("parent.sendall(os.urandom(1 << 16))", "its reader sent a message of"),
    "no JSON": ("parent.sendall(struct.pack('>II', 4, 0) + b'{x}y')", "not JSON"),
    "deep JSON": ("parent.sendall(struct.pack('>II', 400000, 0) + b'[' * 400000)", "not JSON"),
    "no object": ("parent.sendall(struct.pack('>II', 2, 0) + b'[]')", "no object"),
    "other answer": ("wire.send(parent, {'hello': 1})", "not asked for"),
    "too much": ("[wire.send(parent, {'part': True}, bytes(1 << 20)) for _ in range(9)]", "not asked for"),
    "no disk": ("wire.send(parent, {'need': '../../etc/passwd', 'offset': 0, 'length': 1})", "blocks of no disk"),
    "no offset": ("wire.send(parent, {'need': 'vda', 'offset': '0', 'length': 1})", "blocks of no disk"),
    "huge block": ("wire.send(parent, {'need': 'vda', 'offset': 0, 'length': 1 << 30})", "blocks of no disk"),
}


class Zeroes:
    name, size = "vda", 1 << 20

    def read(self, offset, length):
        return bytes(length)


def bad(tmp_path, what, seconds=20.0):
    program = tmp_path / "bad.py"
    program.write_text(f"{BEGIN}\n{what}\ntime.sleep(60)\n")
    return ConfinedTree([sys.executable, str(program)], {"vda": Zeroes()}, seconds=seconds)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("what", "reason"), BAD.values(), ids=BAD)
def test_a_child_gone_wrong_is_an_unreadable_guest(tmp_path, what, reason):
    """I5: never a crash of the parent, and a clear refusal, also for the next question."""
    with bad(tmp_path, what, seconds=1 if "600" in what else 20) as tree:
        for _ in range(2):
            with pytest.raises(GuestUnreadable, match=reason):
                tree.read("/etc/passwd", 1 << 20)


def test_slow_answers_are_limited_together(tmp_path):
    """I5: one that is in time with every answer cannot hold us for as many times as there are files."""
    slow = "while 1: time.sleep(0.3); wire.send(parent, {'done': []}); wire.receive(parent)"
    with bad(tmp_path, slow, seconds=1) as tree:
        with pytest.raises(GuestUnreadable, match="no answer within 10 s, all answers together"):
            tree._patience = 1.0  # it has used the rest
            for _ in range(100):
                assert tree.list("/") == ()


def test_blocks_outside_a_disk_are_refused_and_the_child_is_told(tmp_path):
    ask = "wire.send(parent, {'need': 'vda', 'offset': 1 << 20, 'length': 1}); told = wire.receive(parent)[0]"
    with bad(tmp_path, f"{ask}; wire.send(parent, {{'failed': told['failed'], 'what': 'disk'}})") as tree:
        with pytest.raises(GuestUnreadable, match="1 bytes at 1048576 are asked for and it ends at 1048576"):
            tree.read("/x", 1)


@pytest.mark.parametrize("answer", [["../../etc/passwd"], ["a/b"], [""], ["."], [5], "names", {"a": 1}])
def test_names_that_are_none_are_not_believed(tmp_path, answer):
    with bad(tmp_path, f"wire.send(parent, {{'done': {answer!r}}})") as tree:
        with pytest.raises(GuestUnreadable, match="its reader tells no names"):
            tree.list("/")


@pytest.mark.parametrize("answer", ["etc", "/../x", "/etc//x", 5, None, "/" + "x" * 300])
def test_a_path_that_is_not_resolved_is_not_believed(tmp_path, answer):
    with bad(tmp_path, f"wire.send(parent, {{'done': {answer!r}}})") as tree:
        with pytest.raises(GuestUnreadable, match="does not tell where"):
            tree.resolve("/etc")


def test_words_of_the_child_cannot_steer_a_terminal(tmp_path):
    with bad(tmp_path, "wire.send(parent, {'failed': 'x\\x1b[2J\\n' + 'y' * 10000, 'what': 'z'})") as tree:
        with pytest.raises(GuestUnreadable) as caught:
            tree.read("/x", 1)
    assert str(caught.value).startswith("z cannot be read: x?[2J?yyy")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("keys", [[b"x" * 16385], [b"x"] * 16385, [b"a\0b"]], ids=["long", "many", "zero"])
def test_passphrases_that_no_pipe_takes(keys):
    """Nobody reads from the pipe yet when they are written: more would wait for ever."""
    with pytest.raises(ConfigError, match="zero bytes in it, or all have more than 16384 bytes"):
        ConfinedTree.general({}, Path("/nowhere"), keys)


def test_where_memory_cannot_be_locked_nothing_secret_goes_in(tmp_path, monkeypatch):
    """I7: on a host with swap, a reader whose memory could get there is not started."""
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    monkeypatch.setattr(secrecy, "_SWAPS", swaps)
    monkeypatch.setattr(secrecy.resource, "setrlimit", refuse)
    started = []
    monkeypatch.setattr(confine, "start", lambda *words, **more: started.append(words))
    with pytest.raises(ConfigError, match="could get into this host's swap") as caught:
        ConfinedTree.general({}, Path("/nowhere"), [b"secret"])
    assert "swapoff -a" in caught.value.hint
    assert not started


def test_a_reader_that_cannot_lock_its_memory_reads_no_passphrase(tmp_path, monkeypatch):
    """I7: the parent may have been allowed what the cage is not. It is found out inside, before the pipe is read."""
    pytest.importorskip("guestfs")
    monkeypatch.setattr(secrecy, "swaps", lambda: True)
    monkeypatch.setattr(secrecy, "let_children_lock", lambda: None)
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, before[1]))
    try:
        with ConfinedTree.general({}, tmp_path, [b"secret"], seconds=limit(20)) as tree:
            with pytest.raises(GuestUnreadable, match="could get into this host's swap: Cannot allocate memory"):
                tree.volumes()
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def refuse(*_words):
    raise ValueError("not allowed to raise maximum limit")


def test_a_killed_child_is_told_by_its_signal(tmp_path):
    image = ext4(tmp_path / "image", write_tree(tmp_path / "source", {"/etc/x": "x"}))
    with ConfinedTree.fast({"vda": FileBlocks(image)}) as tree:
        assert tree.volumes()
        inside = int(_children(tree.pid))
        os.kill(tree.pid, signal.SIGKILL)
        _wait_gone(inside)
        with pytest.raises(GuestUnreadable, match="its reader ended"):
            tree.list("/")
