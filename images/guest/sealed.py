"""Which LUKS containers have to be opened before a volume is there, and what crypttab calls them.

Readers tell what is in an opened container as a volume of its own, named `luks-` and the container's name
(`general_child`). A container that nobody had a key for is below nothing that was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from images.guest.fstab import Names
from images.guest.volumes import Volume, opened_name
from images.model import Layer

__all__ = ["containers", "locked"]

# Names of what is opened, and UUIDs of headers, which can be any text: only these are told. No colon is in either.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._@=-]{0,126}")
_UUID = re.compile(r"[0-9A-Za-z-]{1,40}")
_CARRIERS = ("LVM2_member", "crypto_LUKS")


def containers(
    crypttab: Sequence[str], tops: Sequence[Volume], volumes: Sequence[Volume]
) -> tuple[tuple[str, str], ...]:
    """(name, UUID) of each container below `tops`, in the order in which they lie; `crypttab` are its lines, `NAME SPEC
    [KEY [OPTIONS]]`. None at all when it does not name every one: some alone bring up nothing."""
    names, named = Names(volumes), {}
    for words in (line.split() for line in crypttab):
        volume = names.find(words[1].replace('"', "")) if len(words) > 1 else None
        if volume and _NAME.fullmatch(words[0]) and _UUID.fullmatch(volume.uuid):
            named[volume.name] = (words[0], volume.uuid)
    below = dict.fromkeys(one.name for top in tops for one in _below(top, volumes))
    return tuple(named[name] for name in below) if below.keys() <= named.keys() else ()


def locked(volumes: Sequence[Volume]) -> tuple[Volume, ...]:
    """Containers that are closed."""
    inside = {one.name for one in volumes}
    return tuple(one for one in volumes if one.fs == "crypto_LUKS" and opened_name(one.name) not in inside)


def _below(top: Volume, volumes: Sequence[Volume]) -> Iterator[Volume]:
    """Of two groups of LVM in containers on the same disk, both are taken for below."""
    inside = {one.name: one for one in volumes}
    for one in volumes if Layer.LUKS in top.layers else ():
        opened = inside.get(opened_name(one.name)) if one.fs == "crypto_LUKS" else None
        if opened and (_same(opened, top) or _carries(opened, top)):
            yield one


def _same(opened: Volume, top: Volume) -> bool:
    """Also one of several of a btrfs, and a subvolume in it."""
    return bool(top.uuid) and (opened.fs, opened.uuid) == (top.fs, top.uuid)


def _carries(opened: Volume, top: Volume) -> bool:
    layers = top.layers[: len(opened.layers)]
    return opened.fs in _CARRIERS and set(opened.disks) <= set(top.disks) and opened.layers == layers
