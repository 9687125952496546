"""A test boot: the machine that stands for a target, the report of a system, and the verdict."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from appliance.cli.verbs.image import verification
from appliance.config import Home
from appliance.errors import NoSpace, NotSupported, ObjectNotFound, TargetExists
from appliance.service.image import evidence, verifying
from appliance.store import Repository
from appliance.store.backend.memory import MemoryBackend
from images import hardware
from images.model import Device, Firmware, Inventory, Nic
from images.room import refuse_without
from images.verify import report
from images.verify.judge import Waiting, judge, printable
from images.verify.machine import machine_for
from images.verify.manifest import LARGEST, Manifest, differences, heard, lying
from tests.support.imagekit import FolderTree
from tests.support.settling import plan

RELEASE = "6.1.0-50-amd64"
BANNER = f"[    0.000000] Linux version {RELEASE} (debian-kernel@lists.debian.org)\r\n".encode()
HPSA = "pci:v0000103Cd0000323Asv0000103Csd00003241bc01sc04i00"


def devices(machine):
    words = list(machine.words)
    return [words[at + 1] for at, word in enumerate(words) if word == "-device"]


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "disk", "nic", "machine", "firmware"),
    [
        ("qemu-virtio", "virtio-blk-pci,", "virtio-net-pci,", "q35", Firmware.UEFI),
        ("qemu-virtio-bios", "virtio-blk-pci,", "virtio-net-pci,", "pc", Firmware.BIOS),
        ("vmware-pvscsi", "scsi-hd,bus=host0.0,", "vmxnet3,", None, Firmware.UEFI),
        ("vmware-nvme", "nvme,", "vmxnet3,", None, Firmware.UEFI),
        ("aws-nitro", "nvme,", "e1000e,", "pc", Firmware.UEFI),
    ],
)
def test_a_kind_of_machine_has_one_that_stands_for_it(name, disk, nic, machine, firmware):
    """P6-28: what cannot be had exactly is told."""
    found = machine_for(hardware.profile(name), ["vda"])
    assert found.firmware is firmware and found.machine == (machine or found.machine)
    disks = [one for one in devices(found) if "drive=disk0" in one]
    assert len(disks) == 1 and disks[0].startswith(disk), disks
    assert any(one.startswith(nic) for one in devices(found)), devices(found)
    assert bool(found.notes) is (name == "aws-nitro")


@pytest.mark.parametrize("name", hardware.profile_names())
def test_nothing_gets_out_of_any_machine(name):
    """P6-28: in isolation."""
    try:
        found = machine_for(hardware.profile(name), ["vda", "vdb"])
    except NotSupported as error:
        assert "hyperv" in name or "gen" in name, error
        return
    networks = [found.words[at + 1] for at, word in enumerate(found.words) if word == "-netdev"]
    assert len(networks) == sum(nic.wanted for nic in hardware.profile(name).nics)
    assert all("restrict=on" in one for one in networks)
    assert found.console != found.report


def inventory(*found, **more):
    return Inventory(name="rack", source="script", firmware=Firmware.BIOS, devices=found, **more)


def test_a_disk_hangs_where_the_target_carries_the_one_of_its_name():
    ahci = Device(modalias="pci:v00008086d00009D03sv00000000sd00000000bc01sc06i01", slot="1", carries=("sda",))
    nvme = Device(modalias="pci:v0000144Dd0000A808sv00000000sd00000000bc01sc08i02", slot="2", carries=("nvme0n1",))
    own = devices(machine_for(inventory(ahci, nvme), ["nvme0n1", "sda"]))
    assert own[:2] == ["nvme,serial=rewind0,drive=disk0,bootindex=1", "ide-hd,bus=ide.0,drive=disk1,bootindex=2"]
    # In their order where it has none of these names; the last one takes what is left.
    other = devices(machine_for(inventory(ahci, nvme), ["vda", "vdb", "vdc"]))
    assert [one.partition(",")[0] for one in other[:3]] == ["nvme", "ide-hd", "ide-hd"]


def test_disks_of_one_controller_share_it():
    host = Device(modalias="pci:v000015ADd000007C0sv000015ADsd000007C0bc01sc00i00", slot="1", carries=("sda", "sdb"))
    words = devices(machine_for(inventory(host), ["sda", "sdb"]))
    assert sum(one.startswith("pvscsi") for one in words) == 1
    assert sum(one.startswith("scsi-hd,bus=host0.0") for one in words) == 2


def test_sas_disks_have_names_or_linux_does_not_see_them():
    host = Device(modalias="pci:v00001000d00000054sv00001000sd00008000bc01sc00i00", slot="1", carries=("sda", "sdb"))
    words = [one for one in devices(machine_for(inventory(host), ["sda", "sdb"])) if one.startswith("scsi-hd")]
    names = [word for one in words for word in one.split(",") if word.startswith("wwn=0x3")]
    assert len(set(names)) == len(words) == 2


def test_a_controller_that_nobody_has_is_refused():
    with pytest.raises(NotSupported, match="QEMU has nothing like") as caught:
        machine_for(inventory(Device(modalias=HPSA, carries=("sda",))), ["sda"])
    assert "--target" in caught.value.hint


def test_the_report_has_a_line_that_is_not_the_console():
    nvme = Device(modalias="pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02")
    found = machine_for(inventory(nvme, console="ttyS3"), ["vda"])
    assert (found.console, found.report) == ("ttyS3", "ttyS2")
    assert "isa-serial,index=3,chardev=console" in devices(found)
    assert "isa-serial,index=2,chardev=report" in devices(found)


def test_a_card_of_another_kind_keeps_its_address():
    nvme = Device(modalias="pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02")
    card = Nic(modalias="pci:v000014E4d0000165Fsv00001028sd000004DBbc02sc00i00", mac="52:54:00:00:00:07")
    found = machine_for(inventory(nvme, nics=(card,)), ["vda"])
    assert "e1000e,netdev=net0,mac=52:54:00:00:00:07,romfile=" in devices(found)
    assert len(found.notes) == 1 and card.modalias in found.notes[0]


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    for name, text in {
        "etc/hostname": "ledger\n", "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n', "etc/passwd": "root:x:0:0::/:/bin/sh\n",
        "etc/odd name's \"file\"": "odd\n", "etc/resolv.conf": "nameserver 1\n", "etc/ssh/key": "k\n",
        "var/lib/dpkg/status": "Package: a\nStatus: install ok installed\n\nPackage: b\nStatus: deinstall ok config\n",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (root / "etc/systemd/system/multi-user.target.wants/ssh.service").symlink_to("/lib/systemd/system/ssh.service")
    return root


def told(root, tmp_path):
    """What `report.sh` says of a folder."""
    script, out = tmp_path / "report", tmp_path / "out"
    script.write_text(report.script())
    out.write_bytes(b"")
    subprocess.run(["sh", script, out, root], check=True)
    return heard(out.read_bytes())


def test_both_see_the_same(root, tmp_path):
    """P6-27: what the system tells and what is read from the point are compared fact by fact."""
    point, seen = lying(FolderTree(root)), told(root, tmp_path)
    assert point.files == seen.files and len(point.files) == 8
    assert point.links == seen.links == {"/etc/systemd/system/multi-user.target.wants/ssh.service"}
    assert point.facts == {name: seen.facts[name] for name in point.facts}
    assert point.facts["packages"] == "1" and seen.facts["system_name"] == "Debian GNU/Linux 12"
    assert differences(point, seen) == []


def test_each_difference_is_named(root, tmp_path):
    point = lying(FolderTree(root))
    (root / "etc/hostname").write_text("other\n")
    (root / "etc/passwd").write_text("eve\n")
    (root / "etc/resolv.conf").write_text("nameserver 2\n")
    (root / "etc/ssh/key").unlink()
    (root / "etc/new").write_text("new\n")
    assert differences(point, told(root, tmp_path)) == [
        "host name is 'other' and was 'ledger'", "/etc/hostname is another one", "/etc/passwd is another one",
        "/etc/ssh/key is gone", "/etc/new is new",
    ]  # fmt: skip


def test_a_report_is_whatever_a_guest_likes():
    """Hostile: no size, no character and no word does harm."""
    line = b"kernel 6.1\x1b[2J\x07\x00 evil\nnonsense here\nfile zzzz /etc/x\nfile 0123456789abcdef /etc/\xff\nkernel"
    found = heard(line)
    assert found.facts == {"kernel": "6.1[2J evil"}
    assert list(found.files) == ["/etc/�"] and not found.begun and not found.complete
    assert len(heard(b"failed x.service\n" * 1_000_000).lists["failed"]) <= LARGEST // 17 + 1
    assert heard(b"").document()["complete"] is False


def test_the_unit_is_laid_into_run_alone():
    files = report.reporter("ttyS3")
    assert set(files) == {
        "rewind/report", "systemd/system/rewind-report.service", "systemd/system/multi-user.target.d/rewind.conf",
    }  # fmt: skip
    assert b"/dev/ttyS3" in files["systemd/system/rewind-report.service"]


# --- the verdict ----------------------------------------------------------------------------------------------------

UP = Manifest({"kernel": RELEASE}, {}, {}, frozenset(), True, True)


def test_one_kernel_and_a_system_that_tells():
    found = judge(BANNER, UP, Manifest(), RELEASE, "told")
    assert found.booted and found.kernels == (RELEASE,) and not found.reasons


def test_a_system_that_cannot_tell_is_believed_by_its_console():
    """Without systemd nothing of ours runs in it."""
    assert judge(BANNER + b"\r\nDebian\r\n\r\nledger login: ", Manifest(), Manifest(), RELEASE, "x").booted
    assert judge(BANNER + b"[ OK ] Reached target \x1b[0;1;39mMulti-User System.", heard(b""), UP, RELEASE, "x").booted


@pytest.mark.parametrize(
    ("console", "manifest", "reason"),
    [
        (b"SeaBIOS", Manifest(), "no kernel was seen to start"),
        (BANNER + BANNER, UP, "kernels that started"),
        (BANNER.replace(b"50", b"51"), UP, "kernels that started"),
        (BANNER, Manifest({"kernel": "5.10"}, {}, {}, frozenset(), True, True), "says that its kernel is 5.10"),
        (BANNER, Manifest(), "it did not come up: the time was over"),
    ],
)
def test_why_not(console, manifest, reason):
    """P6-12: a second kernel, or another one, is no boot of this point."""
    found = judge(console, manifest, Manifest(), RELEASE, "the time was over")
    assert not found.booted and reason in "; ".join(found.reasons)


def test_failed_units_are_told_and_are_no_failure():
    text = BANNER + b"[\x1b[0;1;31mFAILED\x1b[0m] Failed to start \x1b[0;1;39mnginx.service\x1b[0m - a server.\r\n"
    text += b"ledger login: "
    assert judge(text, Manifest(), Manifest(), RELEASE, "").failed == ("nginx.service",)
    seen = Manifest(UP.facts, {"failed": ("a.mount",)}, {}, frozenset(), True, True)
    found = judge(text, seen, UP, RELEASE, "")
    assert found.booted and found.failed == ("a.mount",)


@pytest.mark.parametrize(
    ("console", "patience"),
    [
        (b"Kernel panic - not syncing: VFS: Unable to mount root fs", 3),
        (b"rewind: CANNOT GO ON: the root file system is not there", 3),
        (b"You are in emergency mode. After logging in", 5),
        (b"ALERT! Gave up waiting for root file system device.", 5),
        (b"\r\nledger login: ", 180),
    ],
)
def test_nobody_waits_for_what_does_not_come(console, patience):
    waiting = Waiting()
    assert waiting.over(b"", b"", 0) == ""
    assert waiting.over(console, b"", 100) == ""
    assert waiting.over(console, b"", 100 + patience - 0.1) == ""
    assert waiting.over(console, b"", 100 + patience)


def test_a_report_that_has_begun_is_waited_for():
    waiting = Waiting()
    assert waiting.over(b"\r\nx login: ", b"rewind-report begin\n", 0) == ""
    assert waiting.over(b"\r\nx login: ", b"rewind-report begin\n", 1000) == ""
    assert waiting.over(b"", b"rewind-report begin\nrewind-report end\n", 1001)


def test_a_console_is_printed_without_its_tricks():
    text = b"\x1b[2J\x1b[0;1;31mred\x1b[0m\rover\r\n\x07bell\n\n\x1b]0;title\x07\n" + b"last\n"
    assert list(printable(text, 3))[-1] == "last"
    assert not any("\x1b" in line or "\x07" in line for line in printable(text, 100))


# --- the evidence ---------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    backend = MemoryBackend(tmp_path.name)
    return SimpleNamespace(home=home, repository=Repository.create(backend, cache=home.cache, key=None))


FIRST, LATER = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC), datetime(2026, 3, 2, 12, 0, 0, tzinfo=UTC)


def test_evidence_lies_beside_the_point(session, tmp_path):
    """P6-28: points are never written again; the newest test of one counts, and goes with it."""
    evidence.put(session, "0a1b", FIRST, False, {"target": "rack"}, {"console.log": b"old"})
    mark = evidence.put(session, "0a1b", LATER, True, {"target": "rack"}, {"console.log": b"Linux", "screen.png": b""})
    evidence.put(session, "ffff", LATER, False, {}, {})
    assert {point: one.booted for point, one in evidence.known(session).items()} == {"0a1b": True, "ffff": False}
    assert evidence.known(session)["0a1b"] == mark and mark.time == LATER
    assert evidence.load(session, mark) == {"target": "rack"}
    files = evidence.fetch(session, mark, tmp_path / "out")
    assert [path.name for path in files] == ["console.log", "evidence.json", "screen.png"]
    assert (tmp_path / "out/console.log").read_bytes() == b"Linux"
    # A console shows what a guest keeps from the other users of this host.
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    with pytest.raises(TargetExists):
        evidence.fetch(session, mark, tmp_path / "out")
    evidence.drop_orphans(session, {"0a1b"})
    assert list(evidence.known(session)) == ["0a1b"]
    with pytest.raises(ObjectNotFound, match="evidence of point ffff"):
        evidence.of(session, "ffff")


def test_what_evidence_is_written_is_told(session, tmp_path):
    """Which file is what, and what the test showed, without a look into the document."""
    document = {"target": "rack", "failed": ["nginx.service"], "differences": [f"package {one}" for one in range(12)]}
    mark = evidence.put(session, "0a1b", LATER, True, document, {"console.log": b"Linux", "report.txt": b""})
    files = tuple(evidence.fetch(session, mark, tmp_path / "out"))
    said = []
    context = SimpleNamespace(output=SimpleNamespace(emit=lambda _record, text: said.extend(text.splitlines())))
    verification._emit(context, mark, document, files)
    assert said[0].endswith("rack  booted") and "  failed unit nginx.service" in said
    assert "  package 9" in said and "  and 2 more" in said and "  package 10" not in said
    (console,) = (one for one in said if "console.log" in one)
    assert console.endswith("out/console.log: what its serial line said") and "5 B" in console
    assert "this user alone" in said[-1]
    assert all(any(one.endswith(f": {words}") for one in said) for name, words in verification._WRITTEN.items()
               if name in ("report.txt", "evidence.json"))  # fmt: skip


def test_nobody_is_told_to_name_another_folder(session, tmp_path, monkeypatch):
    """P6-28: the image lies in the home while it is booted."""

    @contextmanager
    def prepared(*_):
        yield SimpleNamespace(
            planned=SimpleNamespace(plan=plan()), guest=SimpleNamespace(tree=None), template=None, store=None
        )

    monkeypatch.setattr(verifying.making, "prepared", prepared)
    monkeypatch.setattr(verifying, "_inventory", lambda *_: hardware.profile("qemu-virtio-bios"))
    monkeypatch.setattr(verifying, "build_image", lambda *_, folder, **__: refuse_without(1 << 80, folder, "the files"))
    monkeypatch.setattr(verifying.drivers, "reader", lambda *_: None)
    point = SimpleNamespace(domain_uuid="u", id="p")
    with pytest.raises(NoSpace) as told:
        verifying._prepare(session, point, (), "", tmp_path, "")
    assert told.value.hint == "make room there; nothing was written"
