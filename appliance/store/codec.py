"""From plain bytes to what lies in an object, and back: name by keyed hash, compress, seal.

    chunk ──► id = BLAKE3(key "chunk")[:16]
          └─► tag u8 + zstd ──► Box.seal(position, label) ──► record

A Box belongs to one object (a pack, a manifest): its key is derived from the master key and the object's random salt,
and the nonce is the record's position in it. Salts are never used twice and positions in an object are distinct, so no
pair of key and nonce ever repeats, whatever threads, forks or restored virtual machines do.

Everything here is thread-safe and does its heavy work with the interpreter lock released.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import blake3
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import IntegrityError
from appliance.store.backend.base import Buffer

__all__ = ["ID_SIZE", "OVERHEAD", "SALT_SIZE", "Box", "Codec", "compress", "decompress"]

ID_SIZE: Final = 16
SALT_SIZE: Final = 16
OVERHEAD: Final = 16  # of a sealed record: GCM's tag, or the checksum that stands for it

_RAW, _ZSTD = b"\x00", b"\x01"
# Level 1 stores Debian's /usr/lib at 0.41; level 3 costs half as much again for 0.39.
_LEVEL: Final = 1

# nbdkit makes a new Python thread state for every call, which would empty a threading.local each time.
_compressors: deque[zstandard.ZstdCompressor] = deque()
_decompressors: deque[zstandard.ZstdDecompressor] = deque()


def compress(plain: Buffer) -> bytes:
    """Tag and zstd frame, or tag and the bytes as they are when zstd does not make them a sixteenth fewer: the little
    that would be saved is not worth the time of every reader. Dense blocks of maps are such.
    """
    try:
        compressor = _compressors.pop()
    except IndexError:
        compressor = zstandard.ZstdCompressor(level=_LEVEL)
    packed = compressor.compress(plain)
    _compressors.append(compressor)
    return _ZSTD + packed if len(packed) <= len(plain) - len(plain) // 16 - 1 else _RAW + bytes(plain)


def decompress(packed: bytes, limit: int) -> bytes:
    """The plain bytes. Raises ValueError for what `compress` did not make, or for more than `limit` bytes: a frame
    must not be able to ask for more memory than the caller expects.
    """
    body = memoryview(packed)[1:]
    if packed[:1] == _RAW:
        if len(body) > limit:
            raise ValueError(f"{len(body)} bytes where {limit} are the most")
        return bytes(body)
    if packed[:1] != _ZSTD:
        raise ValueError(f"unknown compression {packed[:1].hex()}")
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= limit:
            raise ValueError(f"{size} bytes where {limit} are the most")
        try:
            decompressor = _decompressors.pop()
        except IndexError:
            decompressor = zstandard.ZstdDecompressor()
        plain = decompressor.decompress(body)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    _decompressors.append(decompressor)
    return plain


class Box:
    """Seals and opens the records of one object. `label` says what a record is, so that one cannot pass as another."""

    __slots__ = ("_aead", "_key")

    def __init__(self, key: bytes, encrypted: bool) -> None:
        self._key = key
        self._aead = AESGCM(key) if encrypted else None

    def seal(self, position: int, label: bytes, plain: bytes) -> bytes:
        """`plain` and OVERHEAD bytes. The caller never seals twice at one position."""
        if self._aead is not None:
            return self._aead.encrypt(position.to_bytes(12, "little"), plain, label)
        return plain + self._sum(position, label, plain)

    def open(self, position: int, label: bytes, sealed: Buffer) -> bytes:
        """The plain bytes. Raises IntegrityError when they are not what was sealed there under that label."""
        if len(sealed) < OVERHEAD:
            raise IntegrityError(object="a record", reason="it is cut short")
        if self._aead is not None:
            try:
                return self._aead.decrypt(position.to_bytes(12, "little"), sealed, label)
            except InvalidTag:
                raise IntegrityError(object="a record", reason="its seal is broken") from None
        plain = bytes(sealed[:-OVERHEAD])
        if self._sum(position, label, plain) != bytes(sealed[-OVERHEAD:]):
            raise IntegrityError(object="a record", reason="its checksum is wrong")
        return plain

    def _sum(self, position: int, label: bytes, plain: bytes) -> bytes:
        hasher = blake3.blake3(position.to_bytes(12, "little") + bytes([len(label)]) + label, key=self._key)
        return hasher.update(plain).digest(OVERHEAD)


class Codec:
    """The keys of one repository. Without encryption the ids are keyed all the same (by a key anybody can derive from
    the repository's id), so that the format is one.
    """

    def __init__(self, master: bytes, encrypted: bool) -> None:
        self.encrypted = encrypted
        self._master = master
        self._chunk_key = self._derive("chunk id")
        self._node_key = self._derive("map node id")
        self._sum_key = self._derive("checksum")

    def chunk_id(self, data: Buffer) -> bytes:
        return blake3.blake3(data, key=self._chunk_key).digest(ID_SIZE)

    def node_id(self, data: Buffer) -> bytes:
        return blake3.blake3(data, key=self._node_key).digest(ID_SIZE)

    def checksum(self, data: Buffer) -> bytes:
        """16 bytes that find accidents, over a whole object."""
        return blake3.blake3(data, key=self._sum_key).digest(16)

    def summing(self) -> blake3.blake3:
        """For a checksum as above of what comes piece by piece: `update`, then `digest(16)`."""
        return blake3.blake3(key=self._sum_key)

    def key_check(self) -> bytes:
        """Tells whether two master keys are equal, and nothing else about them."""
        return self._derive("key check")[:16]

    def box(self, kind: str, salt: bytes) -> Box:
        return Box(self._derive(f"box of a {kind}", salt), self.encrypted)

    def _derive(self, purpose: str, salt: bytes = b"") -> bytes:
        return blake3.blake3(self._master + salt, derive_key_context=f"rewind repository 1 {purpose}").digest()
