"""What the scripts of a streamed image do with the local disks, in this host's shell; tests/integration boots them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import images.stream
from images.stream.layout import Disk, Layout
from images.stream.settings import Stream, stream_conf

SCRIPTS = Path(images.stream.__file__).parent
SESSION, PAGE = "rewind-12ab", 4096
SIZE, LOCAL_SIZE = 16 * PAGE, 32 * PAGE
ONE, TWO = "1" * 16, "2" * 16

# What init and keeper have, and this host has not.
COMMON = """
x() { echo 0; }
now() { cut -d. -f1 /proc/uptime; }
tell() { :; }
blockdev() { [ "$1" != --getsz ] || echo $(($(stat -c %s "$2") / 512)); }
fail() { echo "CANNOT GO ON: $*"; exit 1; }
of_disk() { eval "echo \\"\\$RWS_$1_$2\\""; }
"""


class Machine:
    """Folders that stand for those of a machine with the local disk sda, which has no serial number."""

    def __init__(self, folder: Path, mode: str = "stream") -> None:
        self.folder = folder
        for name in ("meet", "tmp", "dev/mapper", "block/sda/queue", "block/dm-0"):
            (folder / name).mkdir(parents=True)
        for name, text in (("size", LOCAL_SIZE // 512), ("removable", 0), ("ro", 0), ("dev", "8:0"),
                           ("queue/logical_block_size", 512)):  # fmt: skip
            (folder / "block/sda" / name).write_text(f"{text}\n")
        (folder / "block/dm-0/stat").write_text("0 0 0 0 0 0 0 0\n")
        self.disk, self.control = folder / "dev/sda", folder / "dev/mapper/rewind-src-control"
        self.disk.write_bytes(bytes(LOCAL_SIZE))
        self.control.write_bytes(bytes(PAGE))
        layout = Layout((Disk("vda", SIZE, ()),), "")
        (folder / "stream.conf").write_bytes(stream_conf(Stream(SESSION, "10.0.0.1", 1, layout, mode)))

    def had(self, state: str, *lines: str) -> None:
        """A record of a boot before, by a disk of which nothing is known but its size."""
        text = "\n".join(["rewind 1", f"state {state}", f"local vda none/{LOCAL_SIZE // 512}", *lines, "end\n"])
        self.control.write_bytes(text.encode().ljust(PAGE, b"\0"))
        (self.folder / "meet/record").write_text(text)

    def marked(self, words: str) -> None:
        self._write_mark(f"rewind {SESSION} vda{words}\n")

    def _write_mark(self, text: str) -> None:
        with self.disk.open("r+b") as file:
            file.seek(SIZE)
            file.write(text.encode().ljust(PAGE, b"\0"))

    @property
    def mark(self) -> str:
        return self.disk.read_bytes()[SIZE : SIZE + PAGE].rstrip(b"\0").decode().strip()

    @property
    def record(self) -> list[str]:
        return self.control.read_bytes().rstrip(b"\0").decode().splitlines()

    def run(self, script: str, command: str) -> str:
        """What a function of a script says."""
        used = ["keeper.sh", script] if script == "fill.sh" else [script]
        text = COMMON.join((SCRIPTS / one).read_text().partition("# --- the way ---")[0] for one in used)
        # /tmp first: the folders of a test may be there. Not every file system can be written past the page cache.
        for before, after in (("/tmp/", "tmp/"), ("/run/rewind", "meet"), ("/sys/block", "block"), ("/dev/$", "dev/$"),
                              ("/dev/mapper", "dev/mapper"), ("/rw/stream.conf", "stream.conf")):  # fmt: skip
            text = text.replace(before, f"{self.folder}/{after}")
        text = text.replace("oflag=direct", "").replace("iflag=direct", "")
        keeper = f"MEET={self.folder}/meet BOOT={TWO} noting='' shown='' SERVICE='' TOTAL={SIZE}\n"
        whole = f". {self.folder}/stream.conf\n{COMMON}{text}\n{keeper}RWS_LOOK=0\n{command}\n"
        (self.folder / "script").write_text(whole)
        done = subprocess.run(["sh", self.folder / "script"], capture_output=True, text=True, timeout=20)
        return done.stdout

    def plans(self) -> bool:
        return (self.folder / "meet/plan").exists()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("mark", "own", "planned"),
    [
        (f" begun {ONE}", True, True),
        ("", True, True),
        (f" begun {TWO}", False, False),  # another machine's, that was filled by half before
        (None, True, False),  # there was no place for one, or the client has grown over it
    ],
)
def test_disk_that_another_machine_began_is_not_the_one_that_is_complete(mark, own, planned, machine):
    """P6-14: virtual disks without a serial number all say the same of themselves. One that was filled by half would be
    taken for complete, for ever."""
    machine.had("alone", f"fill {ONE}")
    if mark is not None:
        machine.marked(mark)
    said = machine.run("hook.sh", "find_own; plan_own")
    assert ("the session is over, and disk vda is not in this machine" in said) is not own
    assert machine.plans() is planned


def test_no_word_of_a_record_is_one_of_any_disk(machine):
    """It is a machine's, and comes over the network."""
    machine.had("alone", "fill *")
    machine.marked(f" begun {ONE}")
    assert "is not in this machine" in machine.run("hook.sh", "find_own")


@pytest.mark.parametrize(("word", "same"), [(ONE, True), (TWO, False)])
def test_what_was_copied_to_one_disk_is_not_on_another(word, same, machine):
    """P6-15: it may be overwritten all the same, being of this session; but from its beginning."""
    machine.had("copying", "copied 50", f"fill {ONE}")
    with machine.disk.open("r+b") as file:
        file.write(b"half of it")
    machine.marked(f" begun {word}")
    assert machine.run("hook.sh", "choose_locals") == "" and machine.plans()
    assert (machine.folder / "meet/same").exists() is same


@pytest.mark.parametrize(
    ("served", "serial", "ours"),
    [
        (b"table", "", True),
        (b"other", "", False),
        (b"other", "XYZ123", True),
        (b"table", "t10.ATAQEMUHARDDISKQM00001", True),
        (b"other", "t10.ATAQEMUHARDDISKQM00001", False),  # by its port, the same in each virtual machine
        (b"other", "QM00013", False),
    ],
)
def test_disk_without_a_place_for_a_mark_is_known_by_more_than_its_size(served, serial, ours, machine):
    """P6-15: any disk of that size, with what somebody needs on it, would be written over without a question."""
    machine.disk.write_bytes(b"table".ljust(SIZE, b"x"))
    (machine.folder / "dev/mapper/rewind-src-vda").write_bytes(served.ljust(SIZE, b"x"))
    (machine.folder / "block/sda/size").write_text(f"{SIZE // 512}\n")
    (machine.folder / "block/sda/serial").write_text(serial)
    text = f"rewind 1\nstate filling\nlocal vda {serial or 'none'}/{SIZE // 512}\nfill {ONE}\nend\n"
    (machine.folder / "meet/record").write_text(text)
    machine.run("hook.sh", "sleep() { :; }; choose_locals")
    assert machine.plans() is ours
    assert ours or "local disk sda is not empty" in (machine.folder / "meet/error").read_text()


def test_two_disks_that_begin_with_zeros_are_not_the_same(machine):
    """btrfs, md and bcache on a whole disk all have their first word behind a page of zeros."""
    served = machine.folder / "dev/mapper/rewind-src-vda"
    machine.disk.write_bytes(bytes(PAGE) + b"what somebody needs".ljust(SIZE - PAGE, b"x"))
    served.write_bytes(bytes(SIZE))
    (machine.folder / "block/sda/size").write_text(f"{SIZE // 512}\n")
    text = f"rewind 1\nstate filling\nlocal vda none/{SIZE // 512}\nfill {ONE}\nend\n"
    (machine.folder / "meet/record").write_text(text)
    machine.run("hook.sh", "sleep() { :; }; choose_locals")
    assert not machine.plans()
    machine.disk.unlink()
    served.unlink()
    assert machine.run("hook.sh", "begins_as_served vda sda && echo same") == "", "neither of them can be read"


def test_disk_that_cannot_be_read_is_not_an_empty_one(machine):
    """One bad sector at its begin, and what somebody needs behind it."""
    machine.disk.unlink()
    machine.had("filling", f"fill {ONE}")
    machine.run("hook.sh", "sleep() { :; }; choose_locals")
    assert not machine.plans()
    assert "local disk sda cannot be read" in (machine.folder / "meet/error").read_text()


@pytest.mark.parametrize(("same", "word", "copied"), [(True, ONE, 50), (False, TWO, 0)])
def test_record_has_the_word_of_the_marks_before_they_have_it(same, word, copied, machine):
    """P6-15: the power may go between the two, and before anything was copied."""
    machine.had("copying", "copied 50", f"fill {ONE}")
    (machine.folder / "meet/plan").write_text(f"vda sda 8:0 none/{LOCAL_SIZE // 512}\n")
    if same:
        (machine.folder / "meet/same").touch()
    first = 'read_record; mark() { echo "$* $(tr -d "\\000" <"$CONTROL" | grep ^fill)"; }; copy_all() { false; }; '
    said = machine.run("fill.sh", f"CONTROL={machine.control}; {first}copy_first")
    assert said == f"begun {word} fill {word}\n"
    machine.run("fill.sh", "read_record; copy_all() { false; }; copy_first")
    assert machine.mark == f"rewind {SESSION} vda begun {word}"
    assert f"fill {word}" in machine.record and f"copied {copied}" in machine.record


def test_end_of_a_session_keeps_what_the_record_has(machine):
    """The word of its disks, and how long the client took to be up, which nobody measures again."""
    machine.had("alone", f"fill {ONE}", "service 61 100 20")
    machine.marked(f" begun {ONE}")
    machine.run("hook.sh", "plan_own")
    machine.run("fill.sh", "read_record; end_session")
    assert machine.mark == f"rewind {SESSION} vda"
    assert {"state detached", f"fill {ONE}", "service 61 100 20"} <= {*machine.record}


def test_time_to_be_up_is_that_of_the_boot_that_fills(machine):
    machine.had("filling", f"fill {ONE}", "service 61 100 20")
    (machine.folder / "meet/plan").write_text(f"vda sda 8:0 none/{LOCAL_SIZE // 512}\n")
    machine.run("fill.sh", "read_record; until_booted() { exit; }; stream")
    assert "state booting" in machine.record and not any(line.startswith("service") for line in machine.record)


def test_client_whose_first_word_was_lost_does_not_wait_for_the_kernel_to_say_it_again(machine):
    """P6-14: that takes half a minute, in which the server gives the place of a silent machine away."""
    said = machine.run("keeper.sh", "sleep 20 & until_linked nbd0 $! 1 || { echo given up; wait $!; echo $?; }")
    assert said == "given up\n143\n"


def test_server_that_does_not_answer_is_told_and_given_more_time(machine):
    said = machine.run("keeper.sh", "grace=$CONNECT; longer vda; longer vda; longer vda; echo $grace")
    assert said == "20\n"
    assert (machine.folder / "tmp/said.vda").read_text().split("\n")[-2] == "no answer from 10.0.0.1:1 for 20 s"


def test_link_that_stands_or_was_refused_is_left_alone(machine):
    (machine.folder / "block/nbd0").mkdir()
    (machine.folder / "block/nbd0/pid").touch()
    assert machine.run("keeper.sh", "sleep 20 & until_linked nbd0 $! 0 && kill $! && echo stands") == "stands\n"
    assert machine.run("keeper.sh", "true & until_linked nbd1 $! 9 && echo ended") == "ended\n"


def test_why_nobody_serves_it_is_told_once_and_again_when_it_is_another_reason(machine):
    """P6-14: the link of a machine whose place was given away breaks first, and is refused after that."""
    words = "tell() { echo \"$*\"; }; sleep() { :; }; doing() { :; }; told='' since=$(now);"
    why = [f"echo {said} >$SAID; for _ in 1 2 3; do without_server control rewind-src-control; done" for said in
           ("''", "'Requested export not present'")]  # fmt: skip
    said = machine.run("keeper.sh", "; ".join((f"{words} SAID={machine.folder}/tmp/said.control", *why)))
    first, second = said.splitlines()
    assert first.startswith("no answer from 10.0.0.1:1") and second.startswith("another machine is served instead")
