"""Guests whose root only libguestfs reads, by the program as it is typed: refused with the command that helps; then
plan, build, boot, and the state as it was. And an encrypted one: what becomes of its passphrase and its master key.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from tests.guests import roots
from tests.support import libvirt, world
from tests.support.imageproof import boot, compare, expected
from tests.support.imagery import ROOT, Imagery
from tests.support.targets import TARGETS, Medium

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]

# Each root on other hardware; the arguments are for the second disk of a mirror.
CELLS = {
    "xfs": ("nvme-vmxnet3-uefi", "esp", ()),
    "btrfs": ("megasas-rtl8139-bios", "iso", ()),
    "md": ("ahci-e1000e-bios", "iso", ("ide-hd,bus=ide.1,drive=disk2",)),
    "luks": ("ahci-e1000e-uefi", "esp", ()),
}
ASKED = ("Enter passphrase", f"{roots.PASSPHRASE}\n")


@pytest.fixture(scope="module")
def reader(libvirt_uri):
    """The folder of a reader that was built as the refusal says, on a machine that has no kernel of its own."""
    home = Path(tempfile.mkdtemp(prefix="reader-"))
    rewind(home, "init", "--repository", home / "repo")
    if not list(Path("/boot").glob("vmlinuz-*")):
        (error,) = rewind(home, "image", "reader", "build", code=3)
        hint = re.search(r"`rewind (.*?)`", error["hint"])[1].split()
    else:
        hint = ["image", "reader", "build"]
    (built,) = rewind(home, *hint)
    assert built["type"] == "image-reader" and built["unfit"] == ""
    (shown,) = rewind(home, "image", "reader", "show")
    assert shown == built
    (check,) = [one for one in rewind(home, "doctor", code=None) if one.get("name") == "image reader"]
    assert check["status"] in ("ok", "warn"), check
    yield Path(built["path"])
    rewind(home, "image", "reader", "remove")
    assert rewind(home, "image", "reader", "show") == []
    shutil.rmtree(home)


def rewind(home, *words, code=0):
    command = [sys.executable, "-m", "appliance.cli", "--home", home, "--connect", libvirt.URI, "--json", *words]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def imagery_of(kind, reader):
    """A home with the client's point; `give` puts the reader there, as if it had been built in this home."""
    images = world.images_folder("image")
    try:
        with Imagery(images, roots.build(kind, reader)) as found:
            target, medium, more = CELLS[kind]
            second = ["-drive", "if=none,id=disk2,file=/dev/null,format=raw"] if more else []
            found.add_target(TARGETS[target], *second, *(word for one in more for word in ("-device", one)))
            yield found, TARGETS[target], medium
    finally:
        shutil.rmtree(images, ignore_errors=True)


def give(imagery, reader):
    folder = imagery.home / "cache/reader"
    folder.mkdir()
    subprocess.run(["cp", "-al", reader, folder], check=True)


def refusal(imagery, target, *more, stdin=None):
    words = ("image", "plan", imagery.name, "--at", imagery.points["first"], "--target", target.name, *more)
    (line,) = imagery.rewind(*words, code=65)
    return line["message"], line["hint"]


def boots(imagery, target, medium, built, folder, answer=("", "")):
    """The image on the point's disks: one kernel, the client's, and the state of the point."""
    (file,) = [one for one in built["files"] if one["name"] == medium]
    with imagery.disks("first", folder) as (disk, *others):
        extra = []
        for other, device in zip(others, CELLS[imagery.client.kind][2], strict=True):
            extra += ["-drive", f"if=none,id=disk2,file={other},format=qcow2,cache=unsafe", "-device", device]
        proof = boot(target, disk, Medium(medium, file["path"]), folder, extra=extra, answer=answer, seconds=240)
    assert proof.up, proof
    assert compare(proof, expected(imagery.client, "first", efi=target.firmware == "uefi")) == [], proof
    return proof


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "md"])
def test_a_root_that_only_libguestfs_reads(kind, reader, tmp_path):
    """P6-01, P6-07, P6-12, P6-19, I1: refused with the command that helps; then the same client, on hardware that it
    has never seen."""
    with imagery_of(kind, reader) as (imagery, target, medium):
        message, hint = refusal(imagery, target)
        assert "no system is on" in message and "`rewind image reader build`" in hint
        give(imagery, reader)
        plan = imagery.plan(target, "first")
        assert (plan["reader"], plan["mode"], plan["buildable"]) == ("general", "template", True)
        assert {"xfs": "xfs", "btrfs": "btrfs", "md": "raid1"}[kind] in {
            Path(one).name.split(".")[0] for one in plan["load"]
        }
        built = imagery.build(target, "first", medium, tmp_path / "image")
        proof = boots(imagery, target, medium, built, tmp_path)
        root = proof.document["root"]
        assert {"xfs": "nvme", "btrfs": f"[/{roots._SUBVOLUME}]", "md": "/dev/md"}[kind] in root, root


# --- an encrypted client --------------------------------------------------------------------------------------------


def secrets(client):
    """The passphrase and the master key in each form that a program might write them."""
    master = bytes.fromhex((client.folder / "master.hex").read_text())
    assert len(master) == 64
    found = {}
    for name, data in {"passphrase": roots.PASSPHRASE.encode(), "master key": master}.items():
        text = base64.b64encode(data).rstrip(b"=")[:-1]
        found[name] = (data, data.hex().encode(), data.hex().upper().encode(), text)
    return found


def having(data, wanted):
    return [name for name, forms in wanted.items() if any(form in data for form in forms)]


class Watch:
    """Looks at the words and the environment of every process, over and over; and what locked memory those have that
    are of the program itself."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.found = Counter()
        self.looks = Counter()
        self.locked = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self):
        while not self._over.wait(0.02):
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has ended
                    self._look(folder)

    def _look(self, folder):
        words = (folder / "cmdline").read_bytes()
        for name in having(words + (folder / "environ").read_bytes(), self.wanted):
            self.found[name, folder.name] += 1
        for part in (b"appliance.cli", b"images.guest.general_child", b"qemu-system", b"qemu-nbd", b"nbdkit"):
            self.looks[part.decode()] += part in words
        if b"appliance.cli" in words and b"--luks-key" in words:
            status = (folder / "status").read_text()
            self.locked[folder.name] = int(re.search(r"VmLck:\s+(\d+)", status)[1])


def files_with(folder, wanted, *but):
    found = []
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink() and not any(path.is_relative_to(one) for one in but):
            found += [(name, path) for name in dict.fromkeys(_in_file(path, wanted))]
    return found


def _in_file(path, wanted):
    """In windows that overlap: some files are gigabytes of holes."""
    with path.open("rb") as file:
        last = b""
        while window := file.read(16 << 20):
            yield from having(last + window, wanted)
            last = window[-512:]


def test_the_search_finds_what_is_there(tmp_path):
    """The control of the next one: a passphrase on a command line, in an environment and in a file is found."""
    wanted = {"passphrase": (b"not-so-secret-41",)}
    (tmp_path / "file").write_bytes(b"x" * 5000 + b"not-so-secret-41")
    assert files_with(tmp_path, wanted) == [("passphrase", tmp_path / "file")]
    for words, environment in ((["not-so-secret-41"], {}), ([], {"A": "not-so-secret-41"})):
        with Watch(wanted) as watch:
            process = subprocess.Popen(["sh", "-c", "sleep 60 & wait", *words], env={**os.environ, **environment})
            try:
                deadline = time.monotonic() + 20
                while not watch.found and time.monotonic() < deadline:
                    time.sleep(0.05)
            finally:
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    os.kill(int(child), 9)
                process.kill()
                process.wait()
        assert ("passphrase", str(process.pid)) in watch.found


def test_an_encrypted_root_and_its_secrets(reader, tmp_path):
    """P6-01, P6-07, I7: the passphrase is given to read the guest and typed where it boots. It and the master key are
    in no file of the image, no report, no log, no file of the home, and in no process's words or environment while the
    image is built; the memory that has them is locked."""
    with imagery_of("luks", reader) as (imagery, target, medium):
        give(imagery, reader)
        wrong, right = tmp_path / "wrong", tmp_path / "right"
        wrong.write_text("guessed\n")
        right.write_text(f"{roots.PASSPHRASE}\n")
        message, hint = refusal(imagery, target, "--luks-key", wrong)
        assert "none of the passphrases opens vda2" in message and "--luks-key FILE" in hint
        wanted = secrets(imagery.client)
        with Watch(wanted) as watch:
            said = built_by_hand(imagery, target, medium, tmp_path / "image", wrong, right)
        assert watch.found == {}
        assert min(watch.looks.values()) > 0, watch.looks
        assert max(watch.locked.values()) > 10000, watch.locked
        assert having(said, wanted) == []
        (built,) = [json.loads(line) for line in said.splitlines() if line.startswith(b'{"type": "image-built"')]
        assert files_with(tmp_path, wanted, right) == []
        assert files_with(imagery.home, wanted) == []
        assert files_with(tempfile.gettempdir(), wanted, right, imagery.home, imagery.images) == []
        assert having(unpacked(tmp_path / "image/initrd"), wanted) == []
        proof = boots(imagery, target, medium, built, tmp_path, ASKED)
        assert proof.document["root"] == "/dev/mapper/sealed_crypt"
        assert having(proof.console.encode(), wanted) == []


def built_by_hand(imagery, target, medium, folder, wrong, right):
    """All that the program says, with every word it has; a passphrase from a file, another one by its input."""
    command = [sys.executable, "-m", "appliance.cli", "--home", imagery.home, "--connect", libvirt.URI, "--json"]
    command += ["--verbose", "image", "build", imagery.name, "--at", imagery.points["first"], "--target", target.name]
    command += ["--media", medium, "--into", folder, "--luks-key", wrong, "--luks-key", "-"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, input=right.read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def unpacked(initrd):
    """All segments, whatever packs them."""
    data = initrd.read_bytes()
    at = data.find(b"\x28\xb5\x2f\xfd")
    assert at >= 0, data[:8]
    return data[:at] + zstandard.ZstdDecompressor().decompressobj().decompress(data[at:])
