"""What a streamed image is told, what its machine tells back, and what is refused before anything is written."""

from __future__ import annotations

import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509

from appliance.errors import ConfigError, NotSupported
from appliance.extents import Extent
from appliance.restore import control
from appliance.service.image import streaming
from images.guest.volumes import Volume
from images.model import Layer, Mount, Root
from images.stream.layout import Disk, Layout, Part, layout_of, plain_layout
from images.stream.settings import Stream, stream_conf, with_stream
from images.stream.tls import make_certificates
from images.template.settings import Settings
from tests.support.limits import limit

MIB = 1 << 20
PARTS = (Part("vda1", 1, MIB, 32 * MIB),)
LAYOUT = Layout((Disk("vda", 64 * MIB, PARTS), Disk("vdb", MIB, ())), "/dev/mapper/rewind-vda1")


def told(**changes) -> dict[str, str]:
    """The settings as a shell understands them."""
    values = {"session": "rewind-12ab", "address": "10.0.0.1", "port": 10809, "layout": LAYOUT, "own": "10.0.0.9/24"}
    text = stream_conf(Stream(**{**values, **changes}))
    done = subprocess.run(["sh", "-c", "set -a; . /dev/stdin; env -0"], input=text, capture_output=True, check=True)
    pairs = (one.partition("=") for one in done.stdout.decode().split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("RWS_")}


def test_what_the_initrd_is_told():
    found = told(local={"vda": "/dev/sda"}, blank=True)
    assert found["RWS_DISKS"] == "vda vdb" and found["RWS_SECTORS_vda"] == "131072"
    assert found["RWS_PARTS_vda"] == "vda1:1:2048:65536" and found["RWS_PARTS_vdb"] == ""
    assert found["RWS_GAP_vda"] == "255" and found["RWS_GAP_vdb"] == ""
    # A disk with partitions is seen only by these, or its partition table would be looked at too.
    assert found["RWS_SHOWN"] == "vda1 vdb"
    assert found["RWS_LOCAL_vda"] == "/dev/sda" and found["RWS_LOCAL_vdb"] == ""
    assert found["RWS_BLANK"] == "yes" and found["RWS_OVERWRITE"] == ""
    assert found["RWS_OWN"] == "10.0.0.9" and found["RWS_GATEWAY"] == ""


def test_gateway_only_where_it_is_needed():
    assert told(own="10.0.0.9/24", gateway="10.0.0.254")["RWS_GATEWAY"] == ""
    assert told(own="10.9.0.9/24", gateway="10.9.0.254")["RWS_GATEWAY"] == "10.9.0.254"
    with pytest.raises(ConfigError, match="no gateway"):
        told(own="10.9.0.9/24")


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "repo.example"},
        {"own": "10.0.0.300/24"},
        {"local": {"vdc": "/dev/sda"}},
        {"local": {"vda": "/dev/sda; reboot"}},
        {"local": {"vda": "$(reboot)"}},
        {"layout": Layout((Disk("vda x", MIB, ()),), "")},
        {"layout": Layout(tuple(Disk(f"vd{letter}", MIB, ()) for letter in "abcdefgh"), "")},
    ],
)
def test_what_cannot_be_told_is_refused(changes):
    with pytest.raises(ConfigError):
        told(**changes)


@pytest.mark.parametrize(("offset", "page"), [(MIB, "255"), (32256, ""), (512 << 10, "127")])
def test_gap_before_the_first_partition(offset, page):
    """An old partition table has its first partition in sector 63: what is before belongs to the boot loader."""
    parts = (Part("vda2", 2, 8 * MIB, MIB), Part("vda1", 1, offset, MIB))
    assert told(layout=Layout((Disk("vda", 64 * MIB, parts),), ""))["RWS_GAP_vda"] == page


def test_nothing_is_a_command():
    """Whatever a name holds, it is a value for the shell."""
    nasty = "'; touch gone; '\n$(reboot)`reboot`"
    assert told(mac=nasty)["RWS_MAC"] == nasty


def test_settings_of_an_image_keep_what_they_had():
    before = Settings(extra={"rw/mine": b"x"}, tools=("lvm",), wait_seconds=7)
    stream = Stream("rewind-1", "10.0.0.1", 1, LAYOUT, own="dhcp", tls={"ca.pem": b"c"})
    after = with_stream(before, stream)
    assert after.extra["rw/mine"] == b"x" and after.extra["rw/tls/ca.pem"] == b"c"
    assert {"rw/stream", "rw/keeper", "rw/fill", "rw/stream.conf"} <= after.extra.keys()
    assert {"lvm", "nbd-client", "dmsetup"} <= set(after.tools) and after.wait_seconds == 7


# --- layout ---


def client(*layers, fstab=(), spec="UUID=r", uuid="r", offset=MIB):
    root = Root(spec=spec, fs="ext4", uuid=uuid, disks=("vda",), layers=layers, offset=offset)
    return SimpleNamespace(host="web", root=root, fstab=fstab)


def volumes():
    part = (Layer.PARTITION,)
    return (
        Volume(name="vda1", disks=("vda",), layers=part, offset=MIB, length=MIB, number=1, uuid="r", fs="ext4"),
        Volume(name="vda2", disks=("vda",), layers=part, offset=2 * MIB, length=MIB, number=2, uuid="u", label="usr"),
        Volume(name="vda1:@", disks=("vda",), layers=part, offset=MIB, length=MIB, number=1, uuid="b"),
        Volume(name="vg/root", disks=("vda",), layers=(Layer.PARTITION, Layer.LVM), uuid="v"),
        Volume(name="vdb", disks=("vdb",), length=MIB, uuid="w"),
    )


SIZES = {"vda": 8 * MIB, "vdb": MIB}


def test_root_on_a_partition_and_usr_on_another():
    mount = Mount("LABEL=usr", "/usr", "ext4", ("ro",))
    found = layout_of(client(Layer.PARTITION, fstab=(mount,)), volumes(), SIZES)
    assert found.root == "/dev/mapper/rewind-vda1" and found.usr == "/dev/mapper/rewind-vda2"
    assert [part.name for part in found.disks[0].parts] == ["vda1", "vda2"]
    assert found.disks[1] == Disk("vdb", MIB, ())


def test_root_on_lvm_is_left_to_lvm():
    assert layout_of(client(Layer.PARTITION, Layer.LVM, uuid="v", offset=0), volumes(), SIZES).root == ""


def test_subvolume_has_the_place_of_its_file_system():
    found = layout_of(client(Layer.PARTITION, uuid="b"), volumes(), SIZES)
    assert found.root == "/dev/mapper/rewind-vda1"


@pytest.mark.parametrize("layer", [Layer.MD, Layer.LUKS])
def test_root_that_looks_alike_on_both_sides_is_refused(layer):
    with pytest.raises(NotSupported, match=layer.value):
        layout_of(client(Layer.PARTITION, layer), volumes(), SIZES)


def test_disk_that_ends_within_a_sector_is_refused():
    with pytest.raises(NotSupported, match="1000 bytes"):
        plain_layout({"vda": 1000})


# --- certificates ---


def test_certificates_have_nothing_in_common():
    """P6-30: an authority for each session, of which nobody keeps the key; valid whatever a machine's clock says."""
    one, two = make_certificates("rewind-1"), make_certificates("rewind-2")
    assert not {*one.server.values(), *one.client.values()} & {*two.server.values(), *two.client.values()}
    assert one.server["ca-cert.pem"] == one.client["ca.pem"]
    authority = x509.load_pem_x509_certificate(one.client["ca.pem"])
    for name in ("server-cert.pem",), ("client.pem",):
        found = x509.load_pem_x509_certificate({**one.server, **one.client}[name[0]])
        found.verify_directly_issued_by(authority)
        assert found.not_valid_before_utc < datetime(1995, 1, 1, tzinfo=UTC)
        assert found.not_valid_after_utc > datetime(2045, 1, 1, tzinfo=UTC)
    assert sum(b"PRIVATE KEY" in data for data in one.server.values()) == 1


# --- what the machine says ---


def record(tmp_path, text):
    path = tmp_path / "control"
    path.write_bytes(text.encode() + bytes(8192))
    return control.read_record(path)


def test_record(tmp_path):
    text = "rewind 1\nstate filling\ndone 5\ntotal 9\nread 7\nwritten 3\nboots 2\nservice 61 100 20\n"
    found = record(tmp_path, text + "local vda eui.1/2048\nend\n")
    assert (found.state, found.done, found.total, found.read, found.written) == ("filling", 5, 9, 7, 3)
    assert found.boots == 2 and found.service == (61, 100, 20) and found.local == {"vda": "eui.1/2048"}
    assert not found.alone


@pytest.mark.parametrize(
    "text",
    ["", "rewind 1\nstate alone\n", "rewind 2\nstate alone\nend\n", "x" * 5000, "rewind 1\nstate nonsense\nend\n"],
)
def test_record_that_is_none(text, tmp_path):
    """Half a record, or one of somebody else, must not end a session: nothing is known to be alone."""
    assert not record(tmp_path, text).alone and record(tmp_path, text).state == ""


def test_hostile_record(tmp_path):
    text = f"rewind 1\nstate booting\ndone {'9' * 400}\ntotal -5\nservice 1 2\nerror \x1b[2J{'e' * 3000}\nend\n"
    found = record(tmp_path, text)
    assert found.done == found.total == 0 and found.service is None
    assert "\x1b" not in found.error and len(found.error) <= 300


def pieces(tmp_path, *extents):
    path = tmp_path / "pieces"
    control.create(path, {"vda": extents})
    data = path.read_bytes()
    assert len(data) % 4096 == 0 and not any(data[:65536])
    *lines, end = data[65536:].rstrip(b"\0").decode().splitlines()
    assert end == "end"
    return [tuple(int(word) for word in line.split()[1:]) for line in lines]


def test_where_nobody_can_answer_is_told_before_an_image_is_made():
    """A port that is taken, and an address that is not of this host."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            streaming._need_free("127.0.0.1", port)
    streaming._need_free("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7:10809: Cannot assign requested address"):
        streaming._need_free("203.0.113.7", 10809)


def test_pieces_cover_the_disk(tmp_path):
    """Each byte of the disk once; small holes go along; long pieces are cut, for progress is told after each."""
    small, last = Extent(200 * MIB, 65536, True), Extent(201 * MIB + 65536, 10 * MIB, True)
    found = pieces(tmp_path, Extent(0, 200 * MIB), small, Extent(200 * MIB + 65536, MIB), last)
    assert [offset for offset, _, _ in found] == [0, 64 * MIB, 128 * MIB, 192 * MIB, 201 * MIB + 65536]
    assert [zero for _, _, zero in found] == [0, 0, 0, 0, 1]
    assert sum(length for _, length, _ in found) == 211 * MIB + 65536


def test_new_control_file_is_an_empty_record(tmp_path):
    control.create(tmp_path / "control", {})
    assert control.read_record(tmp_path / "control") == control.Record()


@pytest.mark.parametrize(("state", "rate"), [("filling", 3), ("copying", 3), ("booting", 0), ("alone", 0)])
def test_pace_is_of_the_last_half_minute(state, rate):
    pace = control.Pace()
    for second in range(100):
        found = pace.of(control.Record(state=state, done=1000 * min(second, 50) + 3 * second), float(second))
    assert found == rate
    assert pace.of(control.Record(state="filling"), 101.0) == 0  # it has begun again


def test_sign_of_life_is_what_a_machine_writes(tmp_path):
    """Its record, and what it writes beside it when there is nothing to tell."""
    path = tmp_path / "control"
    control.create(path, {})
    seen = {control.sign_of_life(path)}
    for offset in (0, 4096):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"alive")
        seen.add(control.sign_of_life(path))
    assert len(seen) == 3


# --- the machine's side ---


@pytest.fixture
def signs(tmp_path):
    """keeper's signs of life on a file, and the file."""
    text = (Path(streaming.__file__).parents[3] / "images/stream/keeper.sh").read_text()
    # /tmp first: what the others become may be below it.
    for before, after in (("/tmp/", f"{tmp_path}/"), ("/run/rewind", tmp_path), ("/dev/mapper", tmp_path)):
        text = text.replace(before, str(after))
    (tmp_path / "keeper").write_text(text.replace("sleep 3", "sleep 0.05"))
    link = tmp_path / "rewind-src-control"
    link.write_bytes(b"")
    with subprocess.Popen(["sh", tmp_path / "keeper", "give_signs"]) as process:
        try:
            wait_for(lambda: b"lives at" in link.read_bytes())
            yield process, link
        finally:
            process.kill()


def wait_for(wanted):
    deadline = time.monotonic() + limit(5)
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_machine_that_only_shows_why_it_does_not_start_is_silent(signs, tmp_path):
    """It would have the right one sent away. One that runs although its local disk is of no use is not silent."""
    process, _ = signs
    (tmp_path / "error").write_text("local disk sda cannot be filled\n")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    (tmp_path / "refused").touch()
    assert process.wait(5) == 0


def test_signs_make_no_file_where_the_link_was(signs):
    process, link = signs
    link.unlink()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    link.unlink(missing_ok=True)  # of one that was under way
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert not link.exists()
