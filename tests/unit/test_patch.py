"""The patch against a model, read by QEMU's own tools."""

import json
import random
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import NotSupported
from appliance.restore.patch import (
    COARSE,
    FINE,
    FULL_MASK,
    Patch,
    all_from_view,
    layout_for,
    patch_info,
    read_patch,
    spread,
    write_patch,
)
from appliance.units import CHUNK, GiB, MiB, TiB

UNIT = CHUNK // 32


def chain(folder, patch):
    """P over a raw disk with a raw view, as one image name."""
    raw = lambda name: {"driver": "raw", "file": {"driver": "file", "filename": str(folder / name)}}  # noqa: E731
    return "json:" + json.dumps({
        "driver": "qcow2", "file": {"driver": "file", "filename": str(patch)},
        "data-file": raw("view.raw"), "backing": raw("disk.raw"),
    })  # fmt: skip


def model(now, target, masks, coarse=False):
    """What a reader must see."""
    seen = bytearray(now)
    for chunk, mask, zero in masks:
        for bit in range(32):
            start = chunk * CHUNK + bit * UNIT
            if (mask and coarse) or mask >> bit & 1:
                end = min(start + UNIT, len(now))
                seen[start:end] = bytes(max(end - start, 0)) if zero else target[start:end]
    return seen


def read_back(folder, patch, size):
    """Everything QEMU reads through the chain."""
    out = folder / "out.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", chain(folder, patch), out], check=True)
    return out.read_bytes()[:size]


masks_of = st.dictionaries(st.integers(0, 20), st.tuples(st.integers(0, FULL_MASK), st.booleans()), max_size=12).map(
    lambda found: [(chunk, mask, zero) for chunk, (mask, zero) in sorted(found.items())]
)


def on_disk(masks, size):
    """Of masks that a comparison could find: nothing differs beyond the end of the disk."""
    found = []
    for chunk, mask, zero in masks:
        units = -(-max(0, min(CHUNK, size - chunk * CHUNK)) // UNIT)
        if mask & (1 << units) - 1:
            found.append((chunk, mask & (1 << units) - 1, zero))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sectors=st.integers(1, 21 * 128), masks=masks_of, later=masks_of, coarse=st.booleans(), seed=st.integers(0, 99))
def test_every_read_equals_the_model(tmp_path_factory, sectors, masks, later, coarse, seed):
    """P5-04 P5-20: for any size and any masks, and after a correction, QEMU reads exactly what the masks say."""
    folder = tmp_path_factory.mktemp("patch")
    size = sectors * 512
    rand = random.Random(seed)
    now, target = rand.randbytes(size), rand.randbytes(size)
    (folder / "disk.raw").write_bytes(now)
    (folder / "view.raw").write_bytes(target)
    inside = on_disk(masks, size)
    path = folder / "P.qcow2"
    write_patch(path, size, inside, layout=COARSE if coarse else FINE)
    subprocess.run(["qemu-img", "check", "-q", chain(folder, path)], check=True)
    assert read_back(folder, path, size) == model(now, target, inside, coarse)
    correction = on_disk(later, size)
    patch = Patch.reopen(path)
    for chunk, mask, zero in correction:
        patch.mark(chunk, mask, zero)
    patch.close()
    final = {m[0]: m for m in inside} | {m[0]: m for m in correction}
    subprocess.run(["qemu-img", "check", "-q", chain(folder, path)], check=True)
    assert read_back(folder, path, size) == model(now, target, final.values(), coarse)


@pytest.mark.parametrize("layout", [FINE, COARSE])
def test_tables_far_apart(tmp_path, layout):
    """Only the touched L2 tables exist, whatever the order, up to 8 TiB; the chunks come back as marked."""
    size = 8 * TiB
    chunks = sorted(random.Random(5).sample(range(size // CHUNK), 40))
    mask = FULL_MASK if layout == COARSE else 0x10003
    info = write_patch(tmp_path / "P", size, [(c, mask, c % 2 == 0) for c in reversed(chunks)], layout=layout)
    alone = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(tmp_path / "P")},
        "data-file": {"driver": "null-co", "size": size},
    }
    subprocess.run(["qemu-img", "check", "-q", "json:" + json.dumps(alone)], check=True)
    assert [c for c, _, _ in read_patch(tmp_path / "P")] == chunks
    assert info.chunks == 40
    assert info.file_bytes < 60 * (1 << layout)


def test_all_from_view(tmp_path):
    """For rolling back: the same blocks, none of them assumed to be zero."""
    path = tmp_path / "P"
    write_patch(path, 10 * MiB, [(0, 1, False), (3, 0b110, True)])
    all_from_view(path)
    all_from_view(path)
    assert list(read_patch(path)) == [(0, 1, 0), (3, 0b110, 0)]


def test_counts(tmp_path):
    """Pending and zero bytes are told apart."""
    info = write_patch(tmp_path / "P", 10 * MiB, [(0, 1, False), (3, 0b110, True), (9, 0, False)])
    assert (info.pending_bytes, info.zero_bytes, info.chunks) == (UNIT, 2 * UNIT, 2)
    assert patch_info(tmp_path / "P") == info


def test_nothing_is_overwritten(tmp_path):
    """A patch of another revert is never written over."""
    write_patch(tmp_path / "P", MiB, [])
    with pytest.raises(FileExistsError):
        write_patch(tmp_path / "P", MiB, [])


def test_odd_size_is_refused(tmp_path):
    """QEMU knows only whole sectors."""
    with pytest.raises(NotSupported):
        write_patch(tmp_path / "P", 1000, [])


def test_spread_and_layout():
    """Masks of 4 KiB and of whole chunks become masks of 2 KiB; huge scattered patches become coarse."""
    assert spread(0b101, 16) == 0b110011
    assert spread(1, 1) == FULL_MASK
    assert layout_for(100 * GiB, 1 << 30) == FINE
    assert layout_for(8 * TiB, 1 << 30) == COARSE
    assert layout_for(8 * TiB, 1000) == FINE
