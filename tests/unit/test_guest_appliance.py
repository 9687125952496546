"""libguestfs' appliance: which one is kept, which is refused, and what happens to the old one."""

import threading

import pytest

from appliance.errors import ConfigError, GuestUnreadable
from images.guest import appliance, open_guest
from images.guest.appliance import Unfit, build_appliance, fitting, host_kernel, kept, remove
from tests.support.guestdisk import debian

HERE = "QEMU emulator version 7.2.22"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A host with libguestfs and QEMU as they can be told, and a supermin that writes one file."""
    host = {"qemu": HERE, "parts": tmp_path / "supermin.d"}
    host["parts"].mkdir()
    (host["parts"] / "daemon.tar.gz").write_text("daemon")
    monkeypatch.setattr(appliance, "_PARTS", host["parts"])
    monkeypatch.setattr(appliance, "_qemu", lambda: host["qemu"])

    def run(command, **_more):
        folder = type(tmp_path)(command[-1])
        folder.mkdir()
        (folder / "root").write_text("root")
        return ""

    monkeypatch.setattr(appliance, "run", run)
    kernel, modules = tmp_path / "vmlinuz-6.1.0-50-amd64", tmp_path / "6.1.0-50-amd64"
    modules.mkdir()
    return host, lambda **more: build_appliance(tmp_path / "kept", kernel=kernel, modules=modules, **more)


def test_it_is_kept_and_found_and_renewed(tmp_path, made):
    _, build = made
    first = build()
    with fitting(tmp_path / "kept") as found:
        assert found == first.folder == kept(tmp_path / "kept").folder
    assert (first.manifest.kernel, first.manifest.qemu, first.unfit) == ("6.1.0-50-amd64", HERE, "")
    second = build()
    assert kept(tmp_path / "kept").folder == second.folder != first.folder
    assert not first.folder.exists()
    assert remove(tmp_path / "kept")
    assert kept(tmp_path / "kept") is None
    assert remove(tmp_path / "nowhere")


def test_what_a_build_has_left_that_was_killed_goes(tmp_path, made):
    """700 MiB, each time. Not what another one is at."""
    _, build = made
    left = tmp_path / "kept" / ".made-killed"
    left.mkdir(parents=True)
    (left / "root").write_text("half of it")
    inner = []
    outer = build(check=lambda _: inner.append(build()))
    assert not left.exists() and inner[0].folder != outer.folder and outer.folder.exists()
    assert sorted(one.name for one in (tmp_path / "kept").iterdir()) == sorted([outer.folder.name, "lock"])


def test_one_that_is_in_use_stays_until_nobody_uses_it(tmp_path, made):
    _, build = made
    first = build()
    with fitting(tmp_path / "kept") as found:
        second = build()
        assert found.exists()
        assert kept(tmp_path / "kept").folder == second.folder
        assert not remove(tmp_path / "kept")
    assert build().folder.exists()
    assert not first.folder.exists() and not second.folder.exists()


def test_of_another_qemu_or_libguestfs_it_is_refused(tmp_path, made):
    """It would start, or not: nobody has tried. A guest is not the one to try it on."""
    host, build = made
    build()
    host["qemu"] = "QEMU emulator version 10.0.2"
    with pytest.raises(Unfit, match=r"of 'QEMU emulator version 7\.2\.22', and this host has 'QEMU .* 10"):
        with fitting(tmp_path / "kept"):
            pass
    host["qemu"] = HERE
    (host["parts"] / "daemon.tar.gz").write_text("another daemon")
    with pytest.raises(Unfit, match="of another libguestfs than this host has now"):
        with fitting(tmp_path / "kept"):
            pass
    build()
    with fitting(tmp_path / "kept"):
        pass


def test_one_that_does_not_start_leaves_the_old_one(tmp_path, made):
    _, build = made
    first = build()

    def refuse(folder):
        assert (folder / "README.fixed").exists()
        raise GuestUnreadable(what="the point", reason="libguestfs does not start")

    with pytest.raises(GuestUnreadable):
        build(check=refuse)
    assert kept(tmp_path / "kept").folder == first.folder
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted([first.folder.name, "lock"])


def test_two_at_once_leave_one(tmp_path, made):
    _, build = made
    threads = [threading.Thread(target=build) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert kept(tmp_path / "kept").unfit == ""
    build()
    assert len(list((tmp_path / "kept").glob("appliance-*"))) == 1


def test_the_newest_kernel_with_its_modules(tmp_path):
    for release in ("6.1.0-9-amd64", "6.1.0-10-amd64", "6.10.0-1-amd64"):
        (tmp_path / "boot").mkdir(exist_ok=True)
        (tmp_path / f"boot/vmlinuz-{release}").touch()
    with pytest.raises(ConfigError, match="no kernel with its modules") as caught:
        host_kernel(tmp_path)
    assert "`rewind image reader build --kernel linux-image-amd64`" in caught.value.hint
    for release in ("6.1.0-9-amd64", "6.1.0-10-amd64"):
        (tmp_path / "lib/modules" / release).mkdir(parents=True)
    kernel, modules = host_kernel(tmp_path)
    assert (kernel.name, modules.name) == ("vmlinuz-6.1.0-10-amd64", "6.1.0-10-amd64")


@pytest.mark.parametrize("state", ["none", "stale"])
def test_a_guest_that_needs_it_is_refused_with_the_command(tmp_path, made, state):
    """The reason of the fast reader, why there is no other, and what to type."""
    host, build = made
    if state == "stale":
        build()
        host["qemu"] = "another"
    disk = tmp_path / "disk"
    disk.write_bytes(b"XFSB" + bytes(1 << 20))
    why = {"none": "this host has no reader", "stale": "the reader that was built"}[state]
    with pytest.raises(GuestUnreadable, match=rf"no system is on vda .*; {why}") as no:
        with open_guest({"vda": f"raw:{disk}"}, tmp_path, appliances=tmp_path / "kept"):
            pass
    assert "`rewind image reader build`" in no.value.hint


def test_a_guest_that_does_not_need_it_is_read_whatever_there_is(tmp_path, made):
    host, build = made
    build()
    host["qemu"] = "another"
    image = debian(tmp_path / "disk")
    with open_guest({"vda": str(image)}, tmp_path, appliances=tmp_path / "kept") as guest:
        assert guest.reader == "fast"
