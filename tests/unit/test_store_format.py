"""Repositories of every version ever written are read: golden files under tests/data, and FORMAT.md beside the code."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import blake3
import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import VersionUnsupported
from appliance.model import Consistency, DiskKind, PointStats, Timeline
from appliance.store import (
    Key,
    Repository,
    collection,
    config,
    damaged,
    lock,
    manifest,
    node,
    open_backend,
    pack,
    parted,
    repository,
    segments,
)
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.units import CHUNK

DATA = Path(__file__).parents[1] / "data"
DOMAIN = "11111111-2222-3333-4444-555555555555"
SECRET = bytes(range(32))


def text(number):
    return (f"chunk {number} of the golden repository; ".encode() * 3000)[:CHUNK]


@pytest.fixture(params=["plain", "encrypted"])
def golden(request, tmp_path):
    folder = tmp_path / "golden"
    shutil.copytree(DATA / f"golden-1-{request.param}", folder)
    return folder, Key(SECRET) if request.param == "encrypted" else None


def test_version_1_is_read(golden, tmp_path):
    folder, key = golden
    repo = Repository.open(open_backend(str(folder)), cache=tmp_path / "c", key=key)
    first, second = repo.points()
    assert (first.id, second.id, second.parent) == ("0a1b", "0a1c", "0a1b")
    assert first.time == datetime(2026, 1, 2, 3, 4, 5, 678900, UTC)
    assert second.consistency is Consistency.FILESYSTEM
    assert second.stats == PointStats(196608, 1234, 3, 0.0123, 1.5)
    assert (second.reason, second.label, second.notes) == ("schedule", "before the upgrade", ("grown",))
    assert second.disk("nvram").kind is DiskKind.NVRAM
    assert first.disk("vda").attributes == {"bus": "virtio"}
    assert [disk.changed for disk in repo.point("0a1c").disks] == [(0, 5, 69999), (0,)]
    assert repo.point("0a1b").disks[0].changed is None

    contents = {14 * n: text(n) for n in range(20)} | {280: random.Random(1).randbytes(1024) + bytes(CHUNK - 1024)}
    read = {i: repo.read_chunk(one) for i, one in repo.map(first.disk("vda").map).items()}
    assert read == contents
    assert first.disk("vda").size == 300 * CHUNK - 4096
    contents = contents | {5: text(3), 69999: contents[280]}
    del contents[0]
    read = {i: repo.read_chunk(one) for i, one in repo.map(second.disk("vda").map).items()}
    assert read == contents
    assert list(repo.diff(first.disk("vda").map, second.disk("vda").map)) == [0, 5, 69999]
    assert repo.timelines(DOMAIN) == [
        Timeline("t1", DOMAIN, datetime(2026, 1, 2, tzinfo=UTC)),
        Timeline("t2", DOMAIN, datetime(2026, 1, 3, tzinfo=UTC), "t1", "0a1b"),
    ]
    report = check(repo, read_data=True)
    assert report.ok, report


def test_version_1_is_written_on(golden, tmp_path):
    """Content that is there is not stored again, roots come out as they did, gc goes on."""
    folder, key = golden
    with Repository.open(open_backend(str(folder)), cache=tmp_path / "c", key=key) as repo:
        first = repo.points()[0]
        with repo.writer() as writer:
            ids = [writer.put(text(n)) for n in range(20)]
            assert writer.stats.new_chunks == 0
            changes = [(n * 14, one) for n, one in enumerate(ids)]
            last = writer.put(random.Random(1).randbytes(1024))
            again = repo.write_map(None, 300 * CHUNK - 4096, [*changes, (280, last)], writer)
        assert again.root == first.disk("vda").map.root
        repo.delete_point("0a1c")
        gc(repo)
        assert check(repo, read_data=True).ok


def test_a_point_keeps_its_place_in_a_journal(golden, tmp_path):
    """P5-27: and a point of the first releases, which had none, says so."""
    folder, key = golden
    with Repository.open(open_backend(str(folder)), cache=tmp_path / "c", key=key) as repo:
        old = repo.point("0a1c")
        assert (old.journal, old.sequence) == ("", None)
        made = replace(old, id="0a1d", parent="0a1c", journal="0f" * 16, sequence=1 << 40)
        repo.commit(made)
        assert repo.point("0a1d") == made


def test_a_reader_made_from_format_md_alone(golden):
    """A second implementation, in thirty lines: a pack's first chunk and its id."""
    folder, key = golden
    config = json.loads((folder / "config").read_text())
    master = (SECRET if key else b"not encrypted") + bytes.fromhex(config["id"])

    def derived(purpose, salt=b""):
        return blake3.blake3(master + salt, derive_key_context=f"rewind repository 1 {purpose}").digest()

    assert derived("key check")[:16].hex() == config["key_check"]
    for path in (folder / "packs").rglob("*"):
        if path.is_dir():
            continue
        data = path.read_bytes()
        assert data[:4] == b"RWPK"
        assert data[4] == 1
        assert data[8:24].hex() == path.name
        assert data[-4:] == b"RWE\x01"
        length, count = int.from_bytes(data[-28:-24], "little"), int.from_bytes(data[-24:-20], "little")
        assert data[-20:-4] == blake3.blake3(data[:-28], key=derived("checksum")).digest(16)
        box = derived("box of a pack", data[8:24])

        def opened(offset, size, label, data=data, box=box):
            sealed, position = data[offset : offset + size], offset.to_bytes(12, "little")
            if key:
                return AESGCM(box).decrypt(position, sealed, label)
            hashed = position + bytes([len(label)]) + label + sealed[:-16]
            assert sealed[-16:] == blake3.blake3(hashed, key=box).digest(16)
            return sealed[:-16]

        table = opened(len(data) - 28 - length, length, b"\0" + data[8:24])
        assert len(table) == 20 * count
        kind, record, size = table[0], table[1:17], int.from_bytes(table[17:20], "big")
        packed = opened(24, size, bytes([kind]) + record)
        if kind == 2:
            assert record[6:] == bytes(10)
            continue
        assert (kind, packed[0]) == (1, 1)
        chunk = zstandard.ZstdDecompressor().decompress(packed[1:])
        assert len(chunk) == CHUNK
        assert record == blake3.blake3(chunk, key=derived("chunk id")).digest(16)


@pytest.fixture(params=["plain", "encrypted"])
def shipped(request, tmp_path):
    folder = tmp_path / "shipped"
    shutil.copytree(DATA / f"golden-1-segments-{request.param}", folder)
    return folder, Key(SECRET) if request.param == "encrypted" else None


def long_segment():
    frames = [(f"frame {n} of the golden segment; ".encode() * 40000)[: 1 << 20] for n in range(17)]
    return b"".join(frames) + b"the end"


def test_segments_of_version_1_are_read(shipped, tmp_path):
    """P5-30: one of two parts, and one that is a piece of the golden journal."""
    folder, key = shipped
    with Repository.open(open_backend(str(folder)), cache=tmp_path / "c", key=key) as repo:
        long, short = repo.segments()
        assert (long.domain_uuid, long.journal, long.first, long.last, long.parts) == (DOMAIN, "0f" * 16, 1, 17, 2)
        assert repo.read_segment(long) == long_segment()
        assert repo.read_segment(long, (16 << 20) - 5, 10) == long_segment()[(16 << 20) - 5 :][:10]
        repo.fetch_segment(short, tmp_path / "one")
        (source,) = (DATA / "journal-1").glob("*01-*.rwj")
        assert (tmp_path / "one").read_bytes() == source.read_bytes()
        assert repo.put_segment(short.domain_uuid, short.journal, short.first, short.last, source) == short
        assert len(repo.segments()) == 2
        report = check(repo, read_data=True)
        assert (report.ok, report.segments) == (True, 2)
        assert gc(repo).segments == 2


def test_a_newer_segment_is_said_to_be_newer(shipped, tmp_path):
    folder, key = shipped
    (path,) = (folder / "segments").glob("*/*/*.1")
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with Repository.open(open_backend(str(folder)), cache=tmp_path / "c", key=key) as repo:
        (long,) = (ref for ref in repo.segments() if ref.parts == 2)
        with pytest.raises(VersionUnsupported, match="version 2, this program reads up to 1"):
            repo.read_segment(long)
        assert [one.kind for one in check(repo).problems] == ["damaged-segment"]


def test_a_reader_of_segments_made_from_format_md_alone(shipped):
    folder, key = shipped
    master = (SECRET if key else b"not encrypted") + bytes.fromhex(json.loads((folder / "config").read_text())["id"])

    def derived(purpose, salt=b""):
        return blake3.blake3(master + salt, derive_key_context=f"rewind repository 1 {purpose}").digest()

    def frames(path):
        data, name = path.read_bytes(), str(path.relative_to(folder)).encode()
        assert data[:8] == b"RWSG\x01" + bytes([key is not None, 0, 0])
        assert data[-4:] == b"RWS\x01"
        length, count = int.from_bytes(data[-12:-8], "little"), int.from_bytes(data[-8:-4], "little")
        box = derived("box of a segment", data[-28:-12])

        def opened(offset, size, kind):
            sealed, position, label = data[offset : offset + size], offset.to_bytes(12, "little"), bytes([kind]) + name
            if key:
                return AESGCM(box).decrypt(position, sealed, label)
            hashed = position + bytes([len(label)]) + label + sealed[:-16]
            assert sealed[-16:] == blake3.blake3(hashed, key=box).digest(16)
            return sealed[:-16]

        table, offset = opened(len(data) - 28 - length, length, 0), 8
        assert len(table) == 32 + 3 * count
        for start in range(32, len(table), 3):
            size = int.from_bytes(table[start : start + 3], "big")
            packed = opened(offset, size, 1)
            plain = packed[1:] if packed[:1] == b"\0" else zstandard.ZstdDecompressor().decompress(packed[1:])
            yield table[:32], plain
            offset += size

    for first in (folder / "segments").glob("*/*/*"):
        if first.suffix:
            continue
        parts = [first, *sorted(first.parent.glob(first.name + ".*"))]
        found = [(number, *one) for number, part in enumerate(parts) for one in frames(part)]
        whole = b"".join(plain for _, _, plain in found)
        for number, table, _ in found:
            assert int.from_bytes(table[:8], "little") == len(whole)
            assert table[8:24] == blake3.blake3(whole, key=derived("checksum")).digest(16)
            assert (int.from_bytes(table[24:28], "little"), int.from_bytes(table[28:], "little")) == (
                len(parts),
                number,
            )


def test_format_md_names_the_versions_and_objects_of_the_code():
    page = (Path(repository.__file__).parent / "FORMAT.md").read_text()
    assert re.search(rf"^# The format of a repository, version {config.VERSION}$", page, re.MULTILINE)
    for prefix in (
        pack.PREFIX,
        manifest.POINTS,
        manifest.TIMELINES,
        lock.PREFIX,
        collection.PREFIX,
        damaged.DAMAGED,
        segments.PREFIX,
        manifest.LEDGERS,
    ):
        assert f"| `{prefix}" in page
    assert f'"RWS" | version u8 = {parted.VERSION}' in page
    assert str(parted.FRAME) in page
    assert f"version u8 = {pack.VERSION}" in page
    assert f"version u8 = {node.NODE_VERSION}" in page
    assert str(node.BLOCK_SIZE) in page


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in DATA.glob("golden-*/**/*") if path.is_file()) < 200 << 10
