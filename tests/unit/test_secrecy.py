"""Memory with a passphrase stays away from swap and core dumps; and what the command line takes for one."""

import os
import subprocess
import sys

import pytest

from appliance import secrecy
from appliance.cli.secrets import luks_keys
from appliance.errors import ConfigError, ToolFailed
from images.guest import accelerator

GUARDED = """
import sys
from appliance.cli.secrets import luks_keys
keys = luks_keys(sys.argv[1:])
print(keys)
for line in open("/proc/self/status"):
    if line.startswith(("VmLck", "VmSize")):
        print(int(line.split()[1]))
for line in open("/proc/self/limits"):
    if line.startswith("Max core file size"):
        print(line.split()[4:6])
"""


def guarded(*words, stdin=b""):
    done = subprocess.run([sys.executable, "-c", GUARDED, *words], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


@pytest.mark.skipif(os.getuid() != 0, reason="locks memory")
def test_a_process_that_has_a_passphrase_is_locked_and_leaves_no_core(tmp_path):
    """I7: nothing of it goes to swap, whatever it reads or makes of it later."""
    (tmp_path / "key").write_bytes(b"correct horse\n")
    keys, size, locked, core = guarded(str(tmp_path / "key"), "-", stdin=b"from a pipe\nmore\n")
    assert keys == "(b'correct horse', b'from a pipe')"
    assert 0 < int(size) - int(locked) < 1024  # what the kernel itself has put into it
    assert core == "['0', '0']"


def test_without_a_passphrase_nothing_is_locked():
    keys, _, locked, _ = guarded()
    assert (keys, locked) == ("()", "0")


@pytest.mark.parametrize("content", [b"", b"\n", b"a\0b", b"x" * 5000])
def test_what_is_no_passphrase(tmp_path, monkeypatch, content):
    monkeypatch.setattr(secrecy, "guard", lambda: None)
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="has no passphrase"):
        luks_keys([str(tmp_path / "key")])
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        luks_keys([str(tmp_path / "none")])


def test_a_passphrase_that_the_reader_cannot_take(tmp_path, monkeypatch):
    """libguestfs takes texts; the reader would die of another one. It is not told, either."""
    monkeypatch.setattr(secrecy, "guard", lambda: None)
    (tmp_path / "key").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="has a passphrase that is not UTF-8") as caught:
        luks_keys([str(tmp_path / "key")])
    # The one before it has the bytes.
    assert caught.value.__suppress_context__ and "caf" not in str(caught.value)


def test_a_host_whose_swap_nobody_can_tell_has_some(tmp_path, monkeypatch):
    for content, expected in (("Filename\tType\n", False), ("Filename\tType\n/dev/zram0\tpartition\n", True)):
        (tmp_path / "swaps").write_text(content)
        monkeypatch.setattr(secrecy, "_SWAPS", tmp_path / "swaps")
        assert secrecy.swaps() is expected
    monkeypatch.setattr(secrecy, "_SWAPS", tmp_path / "none")
    assert secrecy.swaps()


# --- KVM ---


def kvm(monkeypatch, mode, number=(10, 232), group=107, uid=0):
    """A device as stat tells of it. It is never opened, here or by what is tested."""
    told = os.stat_result((mode, 0, 0, 1, 0, group, 0, 0, 0, 0), {"st_rdev": os.makedev(*number)})
    monkeypatch.setattr(accelerator.os, "stat", lambda _path: told)
    monkeypatch.setattr(accelerator.os, "getuid", lambda: uid)


@pytest.mark.parametrize(("mode", "number", "group"), [
    (0o020660, (10, 232), 107), (0o020666, (10, 232), 65534), (0o020600, (10, 232), None), (0o020640, (10, 232), None),
    (0o020666, (1, 3), None), (0o100666, (10, 232), None),
])  # fmt: skip
def test_who_may_use_kvm(monkeypatch, mode, number, group):
    """The cage's user is nobody: it gets there by the device's group, or as everybody does."""
    kvm(monkeypatch, mode, number)
    assert accelerator.kvm_group("auto") == group
    assert accelerator.kvm_group("tcg") is None
    if group is None:
        with pytest.raises(ToolFailed, match="/dev/kvm is not there"):
            accelerator.kvm_group("kvm")


def test_the_cage_shows_kvm_only_when_it_was_decided(tmp_path):
    """images.md 0.1: libguestfs opens what it finds, whatever it is told."""
    guestfs = pytest.importorskip("guestfs")
    from images.guest.general_child import Order, cage

    assert guestfs
    plain, fast = (cage(Order(sockets={}, appliance="/a", kvm=group)) for group in (None, 107))
    assert "/dev/kvm" not in plain.see
    assert (fast.see["/dev/kvm"], fast.group, plain.group) == ("/dev/kvm", 107, None)
