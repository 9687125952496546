"""The host's check of a stamped disk: what it takes for one instant."""

import struct
import zlib

from tests.support import stamps

LAYOUT = stamps.Layout(disks=1, seed=1, span=1 << 20)
# Of writer 2: 7003 stamps slot 15, 7017 stamps it again and 7018 zeroes it.
STAMP, AGAIN, ZERO, SLOT = 7003, 7017, 7018, 15


def disk_after(ops):
    """An image as it is when writer 2 has done so many ops."""
    image = bytearray(LAYOUT.end)
    length = stamps.SLOT_SIZES[2]
    for k in range(1, ops + 1):
        _disk, slot, zero = stamps._op(LAYOUT, 2, k)
        offset = LAYOUT.offset(2, slot)
        image[offset : offset + length] = bytes(length) if zero else stamped(k, offset, length)
    return image


def stamped(k, offset, length):
    found = b""
    for at in range(0, length, stamps.SECTOR):
        head = struct.pack("<8sIIQQQI", b"RWSTAMP1", 2, 0, k, 1, offset + at, length)
        filler = bytes(stamps.SECTOR - stamps._HEAD.size)
        found += head + struct.pack("<I", zlib.crc32(filler, zlib.crc32(head))) + filler
    return found


def checked(image):
    return stamps.check([lambda offset, length: bytes(image[offset : offset + length])], LAYOUT)


def test_an_op_whose_slot_was_zeroed_since_leaves_nothing_either():
    assert [stamps._op(LAYOUT, 2, k)[1:] for k in (STAMP, AGAIN, ZERO)] == [(SLOT, False), (SLOT, False), (SLOT, True)]
    state = checked(disk_after(ZERO))
    assert state.exact and state.seq[2] == ZERO, state


def test_a_write_that_was_lost_is_seen():
    """A slot that is zero though nothing zeroed it."""
    image = disk_after(ZERO)
    lost = next(k for k in range(ZERO, 0, -1) if not stamps._op(LAYOUT, 2, k)[2] and k < ZERO - 20)
    slot = stamps._op(LAYOUT, 2, lost)[1]
    offset = LAYOUT.offset(2, slot)
    image[offset : offset + stamps.SLOT_SIZES[2]] = bytes(stamps.SLOT_SIZES[2])
    state = checked(image)
    assert state.wrong == 1 and f"slot {slot}: op 0 where {lost} is right" in state.messages[0]
