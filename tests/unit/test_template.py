"""The template, the initrd made of it, and the whole build: what is in, what is not, and the same each time."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import subprocess
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from appliance.errors import (
    DriversMissing,
    GuestUnreadable,
    ImageError,
    NoSpace,
    NoSuchTemplate,
    NotSigned,
    TargetExists,
)
from images.build import build_image
from images.model import Decision, Firmware, Layer, Mount, Role, Verdict
from images.template import modules
from images.template.build import content_id, load_template
from images.template.compress import knows_zstd
from images.template.contents import kernel_release
from images.template.initrd import make_initrd
from images.template.newc import Archive, names
from images.template.pack import pack, unpack
from images.template.settings import Settings, conf, settings_for
from tests.support import imagekit

_INIT = Path(__file__).parents[2] / "images/template/init.sh"


@pytest.fixture(scope="module")
def template():
    return imagekit.template()


@pytest.fixture(scope="module")
def client():
    return imagekit.client()


@pytest.fixture
def plan(client):
    return imagekit.plan(client, imagekit.inventory(), "nvme", "e1000e")


def content(client, plan) -> dict[str, bytes]:
    return {path: client.tree().read(f"{plan.client.modules}/{path}", 1 << 27) for path in plan.load}


def listed(initrd: bytes) -> dict[str, int]:
    return names(zstandard.ZstdDecompressor().decompressobj().decompress(initrd))


# --- the archive ----------------------------------------------------------------------------------------------------


def test_archive_is_read_by_cpio(tmp_path):
    archive = Archive()
    archive.file("b/c/file", b"hello", 0o640)
    archive.link("b/link", "c/file")
    archive.device("dev/null", 1, 3, 0o666)
    archive.folder("a")
    data = archive.finish()
    shown = subprocess.run(["cpio", "-itv", "--quiet"], input=data, capture_output=True, check=True).stdout.decode()
    assert [line.split("1970 ")[1] for line in shown.splitlines()] == [
        "a", "b", "b/c", "b/c/file", "b/link -> c/file", "dev", "dev/null",
    ]  # fmt: skip
    assert shown.count("root") == 14
    assert re.search(r"crw-rw-rw-.* 1, +3 .*dev/null", shown)
    assert stat.S_IMODE(names(data)["b/c/file"]) == 0o640


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "a\0b"])
def test_archive_takes_no_strange_names(name):
    with pytest.raises(ImageError, match="no name"):
        Archive().file(name, b"")


def test_archive_takes_no_name_twice():
    archive = Archive()
    archive.file("a", b"1")
    archive.file("a", b"1")
    with pytest.raises(ImageError, match="twice"):
        archive.file("a", b"2")
    with pytest.raises(ImageError, match="no folder"):
        archive.file("a/b", b"")


# --- the template ---------------------------------------------------------------------------------------------------


def test_template_has_kernel_programs_and_loaders(template):
    """P6-06, P6-08: made beforehand, with Debian's kernel, all its modules, and tools that bring their own loader."""
    assert kernel_release(template.kernel.read_bytes()) == template.release
    assert (template.modules / "modules.alias").stat().st_size > 10000
    assert len(list(template.modules.rglob("*.ko*"))) > 500
    assert {"busybox-static", "lvm2", "mdadm", "cryptsetup-bin", "nbd-client"} <= template.manifest.packages.keys()
    for tool, argument in {
        "nbd-client": "--help", "dmsetup": "version", "lvm": "version", "cryptsetup": "--version", "mdadm": "--version",
        "blkid": "--version",
    }.items():  # fmt: skip
        library = template.userland / "rw/lib"
        command = [library / "ld.so", "--library-path", library, template.userland / "rw/bin" / tool, argument]
        done = subprocess.run(command, capture_output=True, text=True, env={"LD_TRACE_LOADED_OBJECTS": "1"})
        assert "not found" not in done.stdout and done.returncode == 0, (tool, done)
        foreign = [line for line in done.stdout.splitlines() if "=>" in line and str(library) not in line]
        assert foreign == []


def test_tools_run(template):
    """With no file of this system in reach: the root is the template's userland alone."""
    if os.geteuid() != 0:
        pytest.skip("needs root for chroot")
    for tool, argument, expected in (("mdadm", "--version", "mdadm"), ("cryptsetup", "--version", "cryptsetup")):
        loader = ["/rw/lib/ld.so", "--library-path", "/rw/lib"]
        command = ["chroot", template.userland, *loader, f"/rw/bin/{tool}", argument]
        done = subprocess.run(command, capture_output=True, text=True)
        assert expected in done.stdout + done.stderr, (tool, done)


@pytest.mark.timeout(120)
def test_packed_template_comes_back(template, tmp_path):
    """P6-06: the same bytes for the same template, and whole again from them."""
    small = tmp_path / "small"
    shutil.copytree(template.folder, small, ignore=lambda folder, found: {"kernel"} & set(found))
    manifest = template.manifest.model_copy(update={"id": content_id(small)})
    (small / "manifest.json").write_text(manifest.model_dump_json())
    pack(load_template(small), tmp_path / "one")
    pack(load_template(small), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = unpack(tmp_path / "one", tmp_path / "back")
    assert back.manifest == manifest
    assert content_id(back.folder) == manifest.id == load_template(back.folder, check=True).id
    assert os.access(back.userland / "init", os.X_OK)
    with pytest.raises(TargetExists):
        unpack(tmp_path / "one", tmp_path / "back")


def _tar(*members: tarfile.TarInfo) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return zstandard.compress(raw.getvalue())


def _link() -> tarfile.TarInfo:
    link = tarfile.TarInfo("a")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    return link


@pytest.mark.parametrize(
    "data",
    [b"", b"no archive", _tar(), _tar(tarfile.TarInfo("../x")), _tar(tarfile.TarInfo("/x")), _tar(_link()),
     _tar(tarfile.TarInfo("x"), tarfile.TarInfo("x"))],
)  # fmt: skip
def test_damaged_template_file(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises((ImageError, NoSuchTemplate)):
        unpack(tmp_path / "file", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_template_is_found_out(template, tmp_path):
    shutil.copytree(template.userland, tmp_path / "t/userland")
    shutil.copy(template.folder / "manifest.json", tmp_path / "t")
    with pytest.raises(ImageError, match="damaged"):
        load_template(tmp_path / "t", check=True)
    with pytest.raises(NoSuchTemplate):
        load_template(tmp_path / "none")
    (tmp_path / "t/manifest.json").write_text("{}")
    with pytest.raises(ImageError, match="manifest"):
        load_template(tmp_path / "t")


# --- the initrd -----------------------------------------------------------------------------------------------------


def test_only_the_modules_of_the_plan(template, client, plan):
    """I2: the plan's closure is in, of the client's release; none of the template's modules is."""
    made = listed(make_initrd(template, plan, content(client, plan), settings_for(plan)))
    found = {name for name in made if name.endswith(".ko")}
    assert found == {f"lib/modules/{client.release}/{modules.plain_name(path)}" for path in plan.load}
    assert not any(template.release in name for name in made)
    assert "rw/bin/blkid" in made and "rw/bin/lvm" not in made  # a plain partition needs no volumes
    assert "rw/root/systemd/network/10-rewind-lan7.link" in made


def test_tools_for_layers(template, client, plan):
    root = replace(plan.client.root, layers=(Layer.PARTITION, Layer.MD, Layer.LUKS, Layer.LVM), volume="vg/root")
    deep = replace(plan, client=replace(plan.client, root=root))
    made = listed(make_initrd(template, deep, content(client, plan), Settings(tools=("nbd-client",))))
    assert {"rw/bin/mdadm", "rw/bin/cryptsetup", "rw/bin/lvm", "rw/bin/dmsetup", "rw/bin/nbd-client"} <= made.keys()


def test_same_initrd_for_the_same_plan(template, client, plan):
    given = content(client, plan)
    first = make_initrd(template, plan, given, settings_for(plan))
    assert first == make_initrd(template, plan, dict(reversed(given.items())), settings_for(plan))
    assert first[:4] == b"\x28\xb5\x2f\xfd"
    gzipped = make_initrd(template, plan, given, settings_for(plan), zstd=False)
    assert gzipped == make_initrd(template, plan, given, settings_for(plan), zstd=False)
    assert gzipped[:2] == b"\x1f\x8b"


def test_append_leaves_the_clients_initrd_as_it_is(template, client, plan):
    """P6-07: behind it, on a multiple of four; ours lies below /rw and in files that both generators look for."""
    theirs = b"070701 whatever it is" + b"!"
    behind = replace(plan, mode="append")
    made = make_initrd(template, behind, content(client, plan), settings_for(plan), client_initrd=theirs)
    assert made.startswith(theirs + bytes(2)) and len(theirs) % 4 == 2
    ours = listed(made[24:])
    files = {name for name, mode in ours.items() if not stat.S_ISDIR(mode) and not name.startswith("rw/")}
    assert files == {
        "conf/conf.d/rewind", "scripts/rewind", "etc/systemd/network/10-rewind-lan7.link",
        "etc/systemd/system/rewind-load.service", "etc/systemd/system/sysinit.target.wants/rewind-load.service",
        "etc/systemd/system/initrd-cleanup.service.d/rewind.conf",
    }  # fmt: skip
    assert len([name for name in ours if name.startswith("rw/kernel/") and name.endswith(".ko")]) == len(plan.load)
    with pytest.raises(GuestUnreadable, match="empty"):
        make_initrd(template, replace(plan, mode="append"), content(client, plan), settings_for(plan))


def test_module_of_another_kernel_is_refused(template, client, plan):
    """P6-20: only modules of exactly the client's release can be loaded."""
    given = content(client, plan)
    donor = next(template.modules.rglob("dm-mod.ko*"))
    path = plan.load[0]
    assert donor.suffix == Path(path).suffix, "both are packed as their release packs them"
    given[path] = donor.read_bytes()
    with pytest.raises(GuestUnreadable, match=f"for kernel {re.escape(template.release)} and not"):
        make_initrd(template, plan, given, settings_for(plan))
    with pytest.raises(ImageError, match="not those of the plan"):
        make_initrd(template, plan, {}, settings_for(plan))


@pytest.mark.parametrize(
    "name, data",
    [("a.ko", b"text"), ("a.ko.xz", b"\xfd7zXZ\0broken"), ("a.ko.zst", b"\x28\xb5\x2f\xfdbroken"), ("a.ko.gz", b"\x1f"),
     ("a.ko.xz", lzma.compress(b"no module")), ("a.ko.zst", zstandard.compress(bytes(200 << 20)))],
    ids=["text", "broken xz", "broken zst", "short gz", "xz of text", "bomb"],
)  # fmt: skip
def test_hostile_module(name, data):
    with pytest.raises(GuestUnreadable, match="module"):
        modules.plain(name, data)


def test_packed_modules_are_unpacked(client, plan):
    path = plan.load[0]
    data = modules.plain(path, client.tree().read(f"{plan.client.modules}/{path}", 1 << 27))
    assert modules.vermagic(data) == client.release
    for name, packed in (("m.ko.xz", lzma.compress(data)), ("m.ko.zst", zstandard.compress(data)), ("m.ko", data)):
        assert modules.plain(name, packed) == data
        assert modules.plain_name(name) == "m.ko"


def test_settings_of_a_guest_are_values_for_the_shell(plan, tmp_path):
    """Whatever stands in the guest's files, init reads it and does not run it."""
    root = replace(plan.client.root, spec="$(touch x)", flags="a'; touch x; '", volume="`touch x`")
    root = replace(root, layers=(Layer.LUKS,), containers=(("seal", "1-a"), ("other", "2")))
    system = replace(
        plan.client, root=root, crypttab=("seal UUID=1-a none luks", "data UUID=3 /key luks", "# note here"),
        fstab=(Mount("UUID=2", "/usr", "ext4", ("defaults", "subvol=u")),),
    )  # fmt: skip
    script = conf(replace(plan, client=system), Settings()).decode()
    show = 'printf "%s\\n" "$RW_ROOT" "$RW_FLAGS" "$RW_VOLUME" "$RW_LUKS" "$RW_USR" "$RW_LAYERS"'
    done = subprocess.run(["sh", "-euc", script + show], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "$(touch x)", "a'; touch x; '", "`touch x`", "seal:UUID=1-a other:UUID=2", "UUID=2 ext4 subvol=u", "luks",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", [("-x", "1"), ("a b", "1"), ("a:b", "1"), ("a*", "1"), ("a", "1 2"), ("a", "*")])
def test_strange_names_of_containers(container, plan):
    """They become words for init's shell and for cryptsetup."""
    root = replace(plan.client.root, layers=(Layer.LUKS,), containers=(container,))
    with pytest.raises(ImageError, match="encrypted container"):
        conf(replace(plan, client=replace(plan.client, root=root)), Settings())


@pytest.mark.parametrize("mount", [Mount("LABEL=a b", "/usr", "ext4", ()), Mount("UUID=*", "/usr", "ext4", ())])
def test_strange_names_of_usr(mount, plan):
    with pytest.raises(ImageError, match="/usr on"):
        conf(replace(plan, client=replace(plan.client, fstab=(mount,))), Settings())


@pytest.mark.parametrize("name", ["", "..", "a b", "a/b", "$(x)", "a" * 16, "a\nb"])
def test_strange_names_of_cards(name, plan):
    with pytest.raises(ImageError, match="cannot have the name"):
        settings_for(replace(plan, rename={imagekit.MAC: name}))


def test_who_knows_zstd():
    assert knows_zstd("6.1.0-50-amd64", None) and knows_zstd("5.10.0", None)
    assert not knows_zstd("5.4.0-42-generic", None) and not knows_zstd("odd", None)
    assert knows_zstd("5.4.0", b"# x\nCONFIG_RD_ZSTD=y\n") and not knows_zstd("6.1", b"# CONFIG_RD_ZSTD is not set\n")


@pytest.mark.parametrize(
    ("volume", "usr", "expected"),
    [
        ("vg/root", "", "lvchange --activate y --sysinit --config some vg/root"),
        ("vg/root", "/dev/vg/usr ext4 ", "vgchange --activate y --sysinit --config some"),
        ("", "", "vgchange --activate y --sysinit --config some"),
    ],
    ids=["the root alone", "a /usr of its own", "a container on a volume"],
)
def test_volumes_that_init_activates(volume, usr, expected):
    """P6-07: the root's own, or all where another one is needed or its name is not known."""
    text = _INIT.read_text()
    function = text[text.index("\nactivate_volumes() {") :].partition("\n}\n")[0] + "\n}\n"
    script = f'x() {{ echo "$@"; }}\nLVM=some RW_VOLUME={volume!r} RW_USR={usr!r}\n{function}activate_volumes'
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"lvm {expected}\n"
    assert "\n    if has lvm; then activate_volumes; fi\n" in text


def test_words_in_the_quotes_of_another_are_none_for_init(tmp_path):
    """The kernel takes `"a=b root=/dev/evil"` for one word, and so does init."""
    (tmp_path / "cmdline").write_text('"dyndbg=file x root=/dev/evil +p" a="b" root=/dev/x b="c rw" rootflags=y\n')
    text = _INIT.read_text().replace("/proc/cmdline", f"{tmp_path}/cmdline").replace("/rw/conf", f"{tmp_path}/none")
    function = text[text.index("\nread_settings() {") :].partition("\n}\n")[0] + "\n}\n"
    script = f'{function}read_settings; echo "$ROOT $FLAGS $MODE"'
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert done.stdout == "/dev/x y ro\n"


@pytest.mark.parametrize("served", [True, False])
def test_machine_that_cannot_go_on_gives_no_sign_of_life(served, tmp_path):
    """P6-14: it only shows why, for a minute, and whoever asks meanwhile would be sent away for it."""
    text = _INIT.read_text().replace("/run/rewind", f"{tmp_path}/meet")
    if served:
        (tmp_path / "meet").mkdir()
    told = text[text.index("\nfail() {") :].partition("    tell")[0]  # what is behind it ends the machine
    subprocess.run(["sh", "-euc", f"{told}\n}}\nfail 'no root'"], check=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["meet", "refused"] * served


def test_init_is_a_script_without_faults():
    path = _INIT
    assert subprocess.run(["shellcheck", path], capture_output=True).returncode == 0
    assert len(path.read_text().splitlines()) < 260


# --- the build ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_build_is_reproducible_and_tells_all(template, client, plan, tmp_path):
    """I2, P6-23: equal digests when repeated; the template is older and the image newer than the request."""
    one = build_image(plan, client.tree(), template, media=["uki", "esp"], folder=tmp_path / "one")
    two = build_image(plan, client.tree(), template, media=["uki", "esp"], folder=tmp_path / "two")
    assert one.digests == two.digests
    assert one.template_created < one.requested < one.created
    assert one.modules == plan.load
    for name, path in one.files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == one.digests[name]
        assert path.stat().st_size == one.sizes[name]
    assert {path.name for path in one.folder.iterdir()} == {
        "vmlinuz", "initrd", "cmdline", "report.json", "rewind.efi", "rewind.esp.img",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert one.files["vmlinuz"].read_bytes() == client.tree().read(plan.client.kernel, 1 << 27)


def test_an_initrd_that_may_hold_a_key_is_put_into_no_image(template, client, plan, tmp_path):
    """I7: in append mode the initrd is the client's, with the key files that are in it."""
    root = replace(plan.client.root, layers=(Layer.PARTITION, Layer.LUKS))
    client_ = replace(plan.client, root=root, crypttab=("r UUID=1 /etc/keys/r.key luks,keyscript=/x",))
    with pytest.raises(ImageError, match=r"may hold the key /etc/keys/r.key, and an image must not hold one"):
        build_image(replace(plan, mode="append", client=client_), client.tree(), template, media=["uki"],
                    folder=tmp_path / "x")  # fmt: skip
    assert _refused(tmp_path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_an_image_is_read_by_who_made_it_alone(mask, template, client, plan, tmp_path):
    """I7: in append mode the initrd is the client's, with whatever is in it. Whoever gets one file of the image handed
    over can pass through the folder."""
    initrd = {"mode": "append", "client": replace(plan.client, initrd="/etc/hostname")}
    before = os.umask(mask)
    try:
        built = build_image(
            replace(plan, **initrd), client.tree(), template, media=["uki", "pxe"], folder=tmp_path / "x"
        )
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (built.folder, *built.folder.rglob("*"))}
    assert len(modes) > 10
    for path, mode in modes.items():
        assert mode == (0o711 if path.is_dir() else 0o600), path


@pytest.mark.timeout(120)
def test_builds_at_once_are_as_if_alone(template, client, tmp_path):
    """P6-29: two targets and two plans at once; each has what it has alone, and another plan is another image."""
    plans = {
        "a": imagekit.plan(client, imagekit.inventory(), "nvme"),
        "b": imagekit.plan(client, imagekit.inventory(Firmware.BIOS), "ahci", "e1000e"),
    }
    digests: dict[str, object] = {}

    def build(name: str, folder: str) -> None:
        built = build_image(plans[name], client.tree(), template, media=["disk"], folder=tmp_path / folder)
        digests[folder] = built.digests

    threads = [threading.Thread(target=build, args=(name, f"{name}-together")) for name in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in plans:
        build(name, f"{name}-alone")
        assert digests[f"{name}-alone"] == digests[f"{name}-together"]
    assert digests["a-alone"] != digests["b-alone"]


def _refused(tmp_path: Path) -> bool:
    return list(tmp_path.iterdir()) == []


def test_missing_driver_writes_nothing(template, client, plan, tmp_path):
    """P6-22, I3: the list, and nothing else."""
    lost = Decision("megaraid_sas", Verdict.MISSING, Role.DISK, "nobody has it", alias="pci:v1")
    hopeless = replace(plan, decisions=(*plan.decisions, lost))
    with pytest.raises(DriversMissing, match=r"no driver for megaraid_sas \(nobody has it\) of target 'test-target'"):
        build_image(hopeless, client.tree(), template, media=["uki"], folder=tmp_path / "x")
    assert _refused(tmp_path)


def test_no_room_is_told_before_anything_is_written(template, client, plan, tmp_path, monkeypatch):
    """P6-22: how much it takes is known by then."""
    monkeypatch.setattr("images.room.free_in", lambda _: 1 << 20)
    words = r"\(1 MiB are free\) for 'the files of the image, which take at least \d+"
    with pytest.raises(NoSpace, match=words) as told:
        build_image(plan, client.tree(), template, media=["uki"], folder=tmp_path / "x")
    assert _refused(tmp_path) and "another folder" in told.value.hint and "forget" not in told.value.hint


def test_store_gives_what_the_client_has_not(template, client, plan, tmp_path):
    """I3: a module of the driver store is read from there and not from the client."""
    decisions = tuple(replace(one, origin="drivers.deb") if one.module == "nvme" else one for one in plan.decisions)
    other = replace(plan, decisions=decisions)
    with pytest.raises(GuestUnreadable, match=r"driver store 'drivers.deb' only"):
        build_image(other, client.tree(), template, media=["uki"], folder=tmp_path / "x")
    asked: list[str] = []

    def store(decision: Decision) -> bytes:
        asked.append(decision.module)
        return client.tree().read(f"{plan.client.modules}/{decision.path}", 1 << 27)

    build_image(other, client.tree(), template, media=["uki"], folder=tmp_path / "x", driver_store=store)
    assert asked == ["nvme"]


def test_secure_boot_takes_only_what_is_signed(template, client, tmp_path):
    """P6-26: refused and not switched off: an unsigned kernel, an unknown vendor, a UKI."""
    target = imagekit.inventory(secure_boot=True)
    cases = (
        ({"signed_kernel": False}, "esp", "kernel"),
        ({"os_id": "arch"}, "esp", "boot loader of 'arch'"),
        ({}, "uki", "medium 'uki'"),
        ({}, "pxe", "medium 'pxe'"),
    )
    for changes, name, reason in cases:
        plan = imagekit.plan(client, target, "nvme", **changes)
        with pytest.raises(NotSigned, match=reason):
            build_image(plan, client.tree(), template, media=[name], folder=tmp_path / "x")
        assert _refused(tmp_path)
    build_image(imagekit.plan(client, target, "nvme"), client.tree(), template, media=["esp"], folder=tmp_path / "x")


def test_what_is_no_kernel_of_this_release(template, client, plan, tmp_path):
    for changes in ({"kernel": "/etc/hostname"}, {"release": "6.1.0-1-amd64"}, {"kernel": "/boot/none"}):
        wrong = replace(plan, client=replace(plan.client, **changes))
        with pytest.raises(GuestUnreadable):
            build_image(wrong, client.tree(), template, media=["uki"], folder=tmp_path / "x")
        assert _refused(tmp_path)


def test_failure_in_the_middle_leaves_nothing(template, client, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    from images.media import esp

    def full(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(esp, "write_disk", full)
    with pytest.raises(OSError, match="no space"):
        build_image(plan, client.tree(), template, media=["uki", "esp"], folder=tmp_path / "x")
    assert _refused(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(TargetExists):
        build_image(plan, client.tree(), template, media=["uki"], folder=tmp_path / "x")
    with pytest.raises(ImageError, match="folder '/proc/x/y' cannot be made"):
        build_image(plan, client.tree(), template, media=["uki"], folder=Path("/proc/x/y"))


def test_the_second_to_end_is_told(template, client, plan, tmp_path, monkeypatch):
    """Two builds into one folder: neither is mixed with the other."""
    from images import build

    settle, first = build._settle, []

    def meanwhile(made: Path) -> None:
        settle(made)
        if not first:
            first.append(made)
            build_image(plan, client.tree(), template, media=["uki"], folder=tmp_path / "x")

    monkeypatch.setattr(build, "_settle", meanwhile)
    with pytest.raises(TargetExists):
        build_image(plan, client.tree(), template, media=["uki"], folder=tmp_path / "x")
    assert [one.name for one in tmp_path.iterdir()] == ["x"] and list((tmp_path / "x").glob("*.efi"))
