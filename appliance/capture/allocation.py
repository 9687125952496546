"""Which chunks of a disk hold anything, as a dirty bitmap that QEMU takes: a first point reads only those.

QEMU pushes every hole as zeroes, at most 1 MiB in a request whatever our side offers (block-copy's own limit): a
million requests for an empty terabyte. No sync mode helps, for a snapshot's holes count as allocated. Nor can one hand
it a bitmap from outside, but it reads those that are stored in qcow2 images, and merges bitmaps across nodes. So the
map of the file goes into a qcow2 image of nothing but a bitmap. Of a raw file that is the file system's map (SEEK_DATA,
which is all that QEMU knows too), of an image qemu-img's.

The order makes it exact: a bitmap begins to record first, then the map is read, and the union of both is pushed. What
was a hole and is written later is in the former. Of an image that QEMU has open, its metadata must have reached the
file in between, which a pause of the guest does.

Layout of the image, in clusters of 64 KiB: header, empty refcount table, bitmap directory, bitmap table, empty L1
table, then the parts of the bitmap that are not all zero. It is only ever opened for reading.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from appliance.hypervisor.base import Disk
from appliance.hypervisor.graph.nodes import Graph
from appliance.process import run
from appliance.units import CHUNK, GiB, chunks_of

__all__ = ["BITMAP", "allocated", "allocated_in_image", "image_file", "raw_file", "write_bitmap"]

BITMAP = "allocated"

_CLUSTER = 1 << 16
_BITS = _CLUSTER * 8  # chunks that one cluster of the bitmap tells of
_SECTOR = 512
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">IIIIQQII")  # bitmaps, then the end of extensions
_ENTRY = struct.Struct(">QIIBBHI")
_EXTENSION_TYPE = 0x23852875
_AUTOCLEAR_BITMAPS = 1
_DIRTY_TRACKING = 1
_WINDOW = 64 * GiB  # what qemu-img tells of at once: a bound for memory
_DIRECTORY, _TABLE = 2, 3  # where they are, in clusters
_REACH = _CLUSTER // 8 * _CLUSTER  # bytes of the disk that one entry of the L1 table stands for


def raw_file(graph: Graph, disk: Disk) -> Path | None:
    """The local file that the disk's guest addresses are offsets of; None for anything else, a block device too: that
    has no holes which it would tell."""
    node = graph.nodes[disk.storage]
    if node.driver not in ("raw", "file") or node.encrypted or "backing" in node.children:
        return None
    try:
        found = os.stat(node.path)
    except OSError:
        return None
    # One that is only a part of a file, or behind an offset, is shorter than it.
    whole = -(-found.st_size // _SECTOR) * _SECTOR == disk.size
    return Path(node.path) if stat.S_ISREG(found.st_mode) and whole else None


def allocated(path: Path) -> Iterator[tuple[int, int]]:
    """(first, stop) of runs of chunks with anything in them, ascending; neighbours may touch. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = os.fstat(file).st_size
        at = 0
        while at < end:
            try:
                start = os.lseek(file, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            stop = os.lseek(file, start, os.SEEK_HOLE)
            first, last = start // CHUNK, chunks_of(stop)
            yield first, last
            at = max(stop, last * CHUNK)
    finally:
        os.close(file)


def image_file(graph: Graph, disk: Disk) -> Path | None:
    """The disk's top image, if its own header and those below name just the chain that QEMU has: else another tool
    would read another disk. Raises ToolFailed."""
    chain = list(graph.chain(disk.storage))
    top = chain[0]
    if top.driver != "qcow2" or any(node.encrypted or not os.path.isabs(node.path) for node in chain):
        return None
    command = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", "qcow2", top.path]
    told = json.loads(run(command, timeout=30))
    same = [(os.path.realpath(one["filename"]), one["format"]) for one in told] == [
        (os.path.realpath(node.path), node.driver) for node in chain
    ]
    return Path(top.path) if same and told[0]["virtual-size"] == disk.size else None


def allocated_in_image(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """As `allocated`, of a qcow2 image and its chain. Raises ToolFailed, ValueError."""
    command = ["qemu-img", "map", "-U", "--output=json", "-f", "qcow2"]
    for at in range(0, size, _WINDOW):
        window = [f"--start-offset={at}", f"--max-length={min(_WINDOW, size - at)}"]
        for entry in json.loads(run([*command, *window, path], timeout=600)):
            if entry["data"] or not entry["zero"]:
                yield entry["start"] // CHUNK, chunks_of(entry["start"] + entry["length"])


def write_bitmap(image: Path, size: int, runs: Iterable[tuple[int, int]]) -> None:
    """Write the image for a disk of `size` bytes. Memory: 16 MiB for 8 TiB. Raises OSError."""
    bits = bytearray(-(-chunks_of(size) // _BITS) * _CLUSTER)
    for first, stop in runs:
        _fill(bits, first, min(stop, chunks_of(size)))
    clusters = [bits[at : at + _CLUSTER] for at in range(0, len(bits), _CLUSTER)]
    l1_entries = -(-size // _REACH)
    l1 = _TABLE + _clusters_for(len(clusters) * 8)
    free = l1 + _clusters_for(l1_entries * 8)
    with image.open("wb") as out:
        out.write(_HEADER.pack(
            b"QFI\xfb", 3, 0, 0, 16, size, 0, l1_entries, l1 * _CLUSTER, _CLUSTER, 1, 0, 0,
            0, 0, _AUTOCLEAR_BITMAPS, 4, _HEADER.size,
        ))  # fmt: skip
        entry = _entry(len(clusters))
        out.write(_EXTENSION.pack(_EXTENSION_TYPE, 24, 1, 0, len(entry), _DIRECTORY * _CLUSTER, 0, 0))
        _write_at(out, _DIRECTORY, entry)
        for number, cluster in enumerate(clusters):
            if any(cluster):
                out.seek(_TABLE * _CLUSTER + number * 8)
                out.write((free * _CLUSTER).to_bytes(8, "big"))
                _write_at(out, free, cluster)
                free += 1
        out.truncate(free * _CLUSTER)


def _entry(table_length: int) -> bytes:
    name = BITMAP.encode()
    fixed = _ENTRY.pack(_TABLE * _CLUSTER, table_length, 0, _DIRTY_TRACKING, CHUNK.bit_length() - 1, len(name), 0)
    return (fixed + name).ljust(-(-len(fixed + name) // 8) * 8, b"\0")


def _write_at(out: BinaryIO, cluster: int, data: bytes | bytearray) -> None:
    out.seek(cluster * _CLUSTER)
    out.write(data)


def _clusters_for(length: int) -> int:
    return max(1, -(-length // _CLUSTER))


def _fill(bits: bytearray, first: int, stop: int) -> None:
    """Set a run of bits, the lowest of each byte first."""
    while first < stop and first % 8:
        bits[first // 8] |= 1 << first % 8
        first += 1
    whole = (stop - first) // 8
    if whole > 0:
        bits[first // 8 : first // 8 + whole] = b"\xff" * whole
        first += whole * 8
    while first < stop:
        bits[first // 8] |= 1 << first % 8
        first += 1
