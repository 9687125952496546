"""The NBD client against nbdkit's own plugins."""

import errno

import pytest

from appliance import nbd
from appliance.errors import ConnectError, NbdFailed
from appliance.extents import Extent
from appliance.process import Child
from appliance.units import MiB


@pytest.fixture
def serve(tmp_path):
    children = []

    def start(*plugin, **options):
        socket = tmp_path / f"{len(children)}.sock"
        child = Child(["nbdkit", "-f", f"--unix={socket}", *plugin], name="nbdkit", **options)
        children.append(child)
        nbd.connect_when_ready(socket, child.alive).close()
        return socket, child

    yield start
    for child in children:
        child.kill()


def test_requests_of_any_length_are_cut_to_what_the_server_takes(serve):
    socket, _ = serve("--filter=blocksize-policy", "memory", "100M", "blocksize-error-policy=error",
                      "blocksize-minimum=1", "blocksize-maximum=1M")  # fmt: skip
    with nbd.connect(socket) as disk:
        assert disk.size() == 100 * MiB
        assert disk.block_sizes()[2] == MiB
        data = bytes(range(256)) * (3 * MiB // 256) + b"tail"
        disk.pwrite(data, 5)
        assert disk.pread(len(data), 5) == data
        assert disk.pread(0, 0) == b""
        disk.zero(2 * MiB, MiB)
        assert disk.pread(3 * MiB, 0)[MiB:] == bytes(2 * MiB)
        disk.flush()
        disk.trim(MiB, 0)


def test_zeroes_are_written_where_the_server_cannot_zero(serve):
    socket, _ = serve("--filter=nozero", "memory", "4M")
    with nbd.connect(socket) as disk:
        disk.pwrite(b"\xff" * 3 * MiB, 0)
        disk.zero(2 * MiB, 0)
        assert disk.pread(3 * MiB, 0) == bytes(2 * MiB) + b"\xff" * MiB


def test_extents_cover_the_range_whatever_pieces_the_server_tells(serve):
    socket, _ = serve("memory", "8M")
    with nbd.connect(socket) as disk:
        assert disk.extents(0, 8 * MiB) == [Extent(0, 8 * MiB, zero=True)]
        disk.pwrite(b"x" * MiB, MiB)
        disk.pwrite(b"x" * MiB, 5 * MiB)
        assert disk.extents(512, 6 * MiB) == [
            Extent(512, MiB - 512, zero=True),
            Extent(MiB, MiB),
            Extent(2 * MiB, 3 * MiB, zero=True),
            Extent(5 * MiB, MiB),
            Extent(6 * MiB, 512, zero=True),
        ]
        assert disk.extents(0, 0) == []


def test_everything_is_data_where_the_server_does_not_tell(serve):
    socket, _ = serve("--filter=noextents", "memory", "8M")
    with nbd.connect(socket, contexts=()) as disk:
        assert disk.extents(5, MiB) == [Extent(5, MiB)]


def test_a_disk_beyond_32_bits_is_asked_in_pieces(serve):
    socket, _ = serve("memory", "8T")
    with nbd.connect(socket) as disk:
        disk.pwrite(b"x", 6 << 40)
        disk.zero(10 << 30, 1 << 40)
        start = (6 << 40) - (5 << 30)
        found = disk.extents(start, 10 << 30)
        assert [extent.zero for extent in found] == [True, False, True]
        assert sum(extent.length for extent in found) == 10 << 30


def test_the_server_s_errno_is_kept(serve):
    socket, child = serve("--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=1")
    with nbd.connect(socket) as disk:
        with pytest.raises(NbdFailed, match="write of 1 bytes at 7 of NBD export '' failed") as caught:
            disk.pwrite(b"x", 7)
        assert caught.value.fields["errno"] == errno.ENOSPC
        child.kill()
        with pytest.raises(NbdFailed):
            disk.pread(1, 0)
    with pytest.raises(ConnectError):
        nbd.connect(socket)


def test_exports_are_listed(serve):
    socket, _ = serve("memory", "1M")
    assert nbd.exports(socket) == [""]
