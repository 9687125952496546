"""What each medium has in it, that it is the same each time, and what is refused."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import ImageError, NotSigned
from images.media import menu
from images.media.base import Medium, Parts, SignedChain, check_command_line, media, medium
from images.media.pe import add_sections, is_signed
from images.model import Firmware
from tests.support import imagekit

EPOCH = 1704067200


@pytest.fixture(scope="module")
def template():
    return imagekit.template()


@pytest.fixture
def parts(template, tmp_path) -> Parts:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "vmlinuz").write_bytes(bytes(range(256)) * 999)
    (tmp_path / "initrd").write_bytes(b"initrd" * 5000)
    return Parts(
        title="tiny on test", kernel=tmp_path / "vmlinuz", initrd=tmp_path / "initrd", command_line="root=/dev/x ro",
        loaders=template.loaders, work=work, identity="0123456789abcdef", epoch=EPOCH,
    )  # fmt: skip


def said(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def content_of(path: Path) -> dict[str, bytes]:
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return {str(one.relative_to(path.parent)): one.read_bytes() for one in files}


def test_registry_finds_every_medium():
    """P6-19: a medium is one file; each says what it is and needs."""
    assert list(media()) == ["disk", "esp", "iso", "pxe", "uki", "usb"]
    for name, one in media().items():
        assert isinstance(one, Medium)
        assert (one.name, bool(one.description), bool(one.needs)) == (name, True, True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["disk", "esp", "iso", "pxe", "uki", "usb"])
def test_same_parts_same_bytes(name, parts, tmp_path):
    """P6-23: at another time, in another folder."""
    one = media()[name]
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        one.make(parts, folder / f"out{one.suffix}")
        if folder == first:
            time.sleep(2.1)  # FAT counts in steps of two seconds
    assert content_of(first / f"out{one.suffix}") == content_of(second / f"out{one.suffix}")
    other = replace(parts, command_line="root=/dev/y ro", work=tmp_path / "other")
    other.work.mkdir()
    one.make(other, tmp_path / "third")
    assert content_of(tmp_path / "third") != content_of(first / f"out{one.suffix}")


def test_uki_has_the_parts(parts, tmp_path):
    uki = tmp_path / "a.efi"
    media()["uki"].make(parts, uki)
    for section, expected in (
        (".linux", parts.kernel.read_bytes()), (".initrd", parts.initrd.read_bytes()), (".cmdline", b"root=/dev/x ro"),
    ):  # fmt: skip
        said("objcopy", "-O", "binary", f"--only-section={section}", uki, tmp_path / "section")
        assert (tmp_path / "section").read_bytes().rstrip(b"\0") == expected.rstrip(b"\0")
    assert not is_signed(uki.read_bytes())


def test_esp_disk_starts_the_uki(parts, tmp_path):
    disk = tmp_path / "a.img"
    media()["esp"].make(parts, disk)
    assert "C12A7328-F81F-11D2-BA4B-00A0C93EC93B" in said("sfdisk", "--dump", disk)
    assert "No errors detected" in said("sfdisk", "--verify", disk)
    said("mcopy", "-n", "-i", f"{disk}@@1M", "::/EFI/BOOT/BOOTX64.EFI", tmp_path / "uki")
    media()["uki"].make(parts, tmp_path / "expected")
    assert (tmp_path / "uki").read_bytes() == (tmp_path / "expected").read_bytes()
    assert disk.stat().st_blocks * 512 < disk.stat().st_size / 2  # zeros are holes


def test_signed_chain_instead_of_a_uki(parts, template, tmp_path):
    """P6-26: shim is what firmware starts; GRUB, kernel and initrd lie where the next one looks."""
    chain = SignedChain(template.loaders / "shim.efi", template.loaders / "grub.efi", "debian")
    disk = tmp_path / "a.img"
    media()["esp"].make(replace(parts, signed=chain), disk)
    expected = {
        "EFI/BOOT/BOOTX64.EFI": chain.shim, "EFI/BOOT/grubx64.efi": chain.grub,
        "rewind/vmlinuz": parts.kernel, "rewind/initrd": parts.initrd,
    }  # fmt: skip
    for name, source in expected.items():
        said("mcopy", "-n", "-i", f"{disk}@@1M", f"::/{name}", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == source.read_bytes()
    config = said("mtype", "-i", f"{disk}@@1M", "::/EFI/debian/grub.cfg")
    assert "linux /rewind/vmlinuz root=/dev/x ro" in config
    assert is_signed(chain.shim.read_bytes()) and is_signed(chain.grub.read_bytes())


@pytest.mark.parametrize("vendor", ["../../../../boot/grub", "/etc", "a/../../b", "", "boot", "a\nb"])
def test_a_file_of_a_medium_stays_inside_it(vendor, parts, template, tmp_path):
    """A guest's word in a path cannot lead out of the folder that is laid out, nor onto another file of the medium."""
    chain = SignedChain(template.loaders / "shim.efi", template.loaders / "grub.efi", vendor)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ImageError, match=r"is no name for a file of a medium|the same file on a medium"):
        media()["esp"].make(replace(parts, signed=chain), tmp_path / "a.img")
    assert sorted(tmp_path.rglob("*")) == before


def test_network_files(parts, tmp_path):
    folder = tmp_path / "pxe"
    media()["pxe"].make(parts, folder)
    script = (folder / "boot.ipxe").read_text()
    assert script.startswith("#!ipxe\nkernel --name BOOT_IMAGE=vmlinuz vmlinuz initrd=initrd root=/dev/x ro\n")
    assert "APPEND root=/dev/x ro\n" in (folder / "pxelinux.cfg/default").read_text()
    told = (folder / "README").read_text()
    assert all(name in told for name in ("rewind.efi", "boot.ipxe", "pxelinux.cfg/default", "grub/grub.cfg"))
    checked = subprocess.run(["sha256sum", "--check", "--strict", "sha256sums"], cwd=folder, capture_output=True)
    assert checked.returncode == 0


@pytest.mark.parametrize("name", ["a b", "$HOME", "b\\c", "-x", "é'\""])
def test_a_folder_may_have_any_name(name, parts, tmp_path):
    """mtools, for one, expands variables in the path of an image."""
    (tmp_path / name).mkdir()
    parts = replace(parts, work=tmp_path / name)
    for kind in ("esp", "iso"):
        media()[kind].make(parts, out := tmp_path / name / f"{kind}.image")
        assert out.stat().st_size > 1 << 20


def test_refusals():
    """P6-20, P6-26: an unknown medium, one that this firmware cannot start, one that Secure Boot would refuse."""
    with pytest.raises(ImageError, match="no medium 'floppy'"):
        medium("floppy", Firmware.UEFI, target="t", secure_boot=False)
    with pytest.raises(ImageError, match="'t' has BIOS firmware, which cannot start medium 'uki'") as refused:
        medium("uki", Firmware.BIOS, target="t", secure_boot=False)
    assert "disk" in refused.value.hint and "esp" not in refused.value.hint
    for name in ("uki", "pxe"):
        with pytest.raises(NotSigned, match="target 't'"):
            medium(name, Firmware.UEFI, target="t", secure_boot=True)
    assert medium("esp", Firmware.UEFI, target="t", secure_boot=True).name == "esp"


@pytest.mark.parametrize("line", ["a\nb", "a\0b", "a\tb", "a" * 2048, "ü", "a initrd=/x", 'b="c initrd=../x"'])
def test_command_line_that_no_loader_passes_on(line):
    with pytest.raises(ImageError, match="command line"):
        check_command_line(line)


def test_grub_takes_a_hostile_command_line_for_words(parts):
    """A guest's command line is text, and no program of GRUB's."""
    hostile = replace(parts, command_line="a;halt $root ${x} 'y' \"z\" #c {d} plain=1", console="ttyS1,9600")
    text = menu.grub(hostile, "/k", "/i").decode()
    assert "linux /k 'a;halt' '$root' '${x}' ''\\''y'\\''' z '#c' '{d}' plain=1\n" in text
    assert "serial --unit=1" in text
    with pytest.raises(ImageError, match="iPXE"):
        menu.ipxe(hostile, "k", "i")


@pytest.mark.parametrize("line", ["a || shell", "a && shell", "a ; shell", "a #b", 'x="a ; shell"', "a ${net0/mac}"])
def test_ipxe_is_given_no_words_that_it_acts_on(line, parts):
    """It has no quotes: what ends its command or begins a comment would let a guest's line go on as commands."""
    with pytest.raises(ImageError, match=r"which iPXE would take for its own"):
        menu.ipxe(replace(parts, command_line=f"root=/dev/x {line}"), "k", "i")
    harmless = replace(parts, command_line="a||b a&&b a;b a#b a;")
    assert b"initrd=i a||b a&&b a;b a#b a;\n" in menu.ipxe(harmless, "k", "i")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('dyndbg="file a.c +p" ro', "'dyndbg=file a.c +p' ro"),
        ('"a=b  c" ro', "'a=b  c' ro"),
        ('a="b" ro', "a=b ro"),
        ("a=it's ro", "'a=it'\\''s' ro"),
        ('a="" "" ro', "a= ro"),
        ('a="not closed ro', "'a=not closed ro'"),
    ],
)
def test_grub_passes_on_a_word_with_spaces_as_one(line, words, parts):
    """P6-04: GRUB puts quotes around a word with spaces itself, and a backslash before one that is in it."""
    text = menu.grub(replace(parts, command_line=line), "/k", "/i").decode()
    assert f"linux /k {words}\n" in text


@pytest.mark.parametrize("data", [b"", b"MZ", b"MZ" + bytes(400), b"MZ" + b"\xff" * 400, b"\x7fELF" + bytes(600)])
def test_what_is_no_program_is_not_signed(data):
    assert not is_signed(data)


def test_sections_only_on_a_program(tmp_path):
    (tmp_path / "text").write_text("no program")
    with pytest.raises(Exception, match=r"objdump|no EFI program"):
        add_sections(tmp_path / "text", [(".a", tmp_path / "text")], tmp_path / "out")
