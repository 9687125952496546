"""Where the client's partitions and its root are: dm has no partition tables, so the builder tells the initrd.

Roots that the initrd can put together from a link: a partition, a whole disk, and LVM on these. For what lies on md or
LUKS the link and a half filled local disk look alike to the tools that assemble it, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.errors import NotSupported
from images.guest.volumes import Volume
from images.model import Client, Layer

__all__ = ["Disk", "Layout", "Part", "layout_of", "plain_layout"]

SECTOR = 512
_TAGS = {"UUID": "uuid", "LABEL": "label", "PARTUUID": "partuuid", "PARTLABEL": "partlabel"}


@dataclass(frozen=True, slots=True)
class Part:
    """A partition; `offset` and `length` in bytes."""

    name: str
    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the client by its target, `size` in bytes. One without `parts` carries its content as a whole."""

    name: str
    size: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """`root` is the node that init mounts, empty where LVM has to find it; `usr` the same for a /usr of its own."""

    disks: tuple[Disk, ...]
    root: str
    usr: str = ""


def layout_of(client: Client, volumes: Sequence[Volume], sizes: Mapping[str, int]) -> Layout:
    """The layout of all disks (target to bytes). Raises NotSupported for a root that a link cannot carry, or a disk
    that does not end with a whole sector."""
    layers = set(client.root.layers)
    if wrong := layers & {Layer.MD, Layer.LUKS}:
        names = " and ".join(sorted(layer.value for layer in wrong))
        raise NotSupported(
            object=f"{client.host!r}", reason=f"its root is on {names}, which cannot be streamed",
            hint="--copy-first writes the local disk before the system starts",
        )  # fmt: skip
    disks = tuple(_disk(name, size, volumes) for name, size in sizes.items())
    root = "" if Layer.LVM in layers else _node(_named(client.root.uuid, client.root.offset, volumes, client))
    usr = next((mount.spec for mount in client.fstab if mount.where == "/usr"), "")
    return Layout(disks, root, _node(_tagged(usr, volumes)))


def plain_layout(sizes: Mapping[str, int], volumes: Sequence[Volume] = ()) -> Layout:
    """Of disks that are only copied: nothing is put together of them."""
    return Layout(tuple(_disk(name, size, volumes) for name, size in sizes.items()), "")


def _disk(name: str, size: int, volumes: Sequence[Volume]) -> Disk:
    if size % SECTOR:
        raise NotSupported(object=f"disk {name!r}", reason=f"its {size} bytes are no whole number of sectors")
    parts = [
        Part(one.name, one.number, one.offset, one.length)
        for one in volumes
        if one.disks == (name,) and one.layers == (Layer.PARTITION,) and one.number and ":" not in one.name
    ]
    return Disk(name, size, tuple(parts))


def _named(uuid: str, offset: int, volumes: Sequence[Volume], client: Client) -> Volume:
    """The root's volume. A subvolume of a btrfs has the place of the file system."""
    for one in volumes:
        if one.uuid == uuid and one.offset == offset and one.disks == client.root.disks:
            return one
    raise NotSupported(object=f"{client.host!r}", reason=f"its root {client.root.spec} is not at one place of a disk")


def _tagged(spec: str, volumes: Sequence[Volume]) -> Volume | None:
    kind, _, value = spec.partition("=")
    field = _TAGS.get(kind)
    found = (one for one in volumes if field and getattr(one, field) == value and set(one.layers) <= {Layer.PARTITION})
    return next(found, None)


def _node(volume: Volume | None) -> str:
    return f"/dev/mapper/rewind-{volume.name.partition(':')[0]}" if volume else ""
