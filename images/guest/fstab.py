"""/etc/fstab and /etc/crypttab, and which volume a name in them means.

A name by number of a disk (`/dev/sdb1`) is what the kernel gave it on the old hardware: it is taken as the disk of the
same letter, and `Names.by_number` remembers it for a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from images.guest.texts import lines
from images.guest.volumes import Volume, opened_name, partition_name
from images.model import Mount

__all__ = ["Names", "parse_crypttab", "parse_fstab"]

_TAGS = {"UUID": "uuid", "LABEL": "label", "PARTUUID": "partuuid", "PARTLABEL": "partlabel"}
_BY = {"by-uuid": "UUID", "by-label": "LABEL", "by-partuuid": "PARTUUID", "by-partlabel": "PARTLABEL"}
_NUMBERED = re.compile(r"/dev/(?:(?:sd|hd|vd|xvd)([a-z])|nvme(\d)n1p?|mmcblk(\d)p?)(\d*)")
_MOST = 1000


def parse_fstab(content: str) -> tuple[Mount, ...]:
    """Its lines; those with less than three fields are left out, as mount does."""
    found: list[Mount] = []
    for line in lines(content):
        parts = line.split()
        if len(parts) >= 3 and len(found) < _MOST:
            options = tuple(parts[3].split(",")) if len(parts) > 3 else ("defaults",)
            found.append(Mount(_spaces(parts[0].strip('"')), _spaces(parts[1]), parts[2], options))
    return tuple(found)


def parse_crypttab(content: str) -> tuple[str, ...]:
    """Its lines as they stand there."""
    return tuple(lines(content))[:_MOST]


class Names:
    """Which volume a specification means. `crypttab` are its lines: what they call the volumes in opened containers.
    Disks are in the order of their letters."""

    def __init__(self, volumes: Sequence[Volume], crypttab: Sequence[str] = ()) -> None:
        self._volumes = volumes
        self._sealed = {words[0]: words[1] for words in map(str.split, crypttab) if len(words) > 1}
        self._disks = sorted({disk for volume in volumes for disk in volume.disks}, key=lambda name: (len(name), name))
        self.by_number: list[str] = []

    def find(self, spec: str) -> Volume | None:
        """`UUID=…`, `/dev/disk/by-…/…`, `/dev/mapper/…`, `/dev/VG/LV`, `/dev/sda1`; None when there is no such."""
        tag, mark, value = spec.partition("=")
        if mark and tag in _TAGS:
            return self._tagged(tag, value.strip('"'))
        parts = spec.split("/")
        if spec.startswith("/dev/disk/") and len(parts) == 5 and parts[3] in _BY:
            return self._tagged(_BY[parts[3]], parts[4].replace("\\x20", " "))
        if spec.startswith("/dev/mapper/"):
            return self._opened(parts[-1]) or self._named(mapped_name(parts[-1]))
        return self._named(spec.removeprefix("/dev/")) or self._numbered(spec)

    def _opened(self, name: str) -> Volume | None:
        spec = self._sealed.get(name, "")
        # A container in one that only has a name itself is found by its UUID, as Debian writes it.
        container = self.find(spec.replace('"', "")) if spec and not spec.startswith("/dev/mapper/") else None
        return self._named(opened_name(container.name)) if container else None

    def _tagged(self, tag: str, value: str) -> Volume | None:
        # A UUID of FAT is written in either case.
        found = [one for one in self._volumes if getattr(one, _TAGS[tag]).casefold() == value.casefold() and value]
        plain = [one for one in found if not one.flags]  # not a subvolume
        return next(iter(plain or found), None)

    def _named(self, name: str) -> Volume | None:
        return next((one for one in self._volumes if one.name == name), None)

    def _numbered(self, spec: str) -> Volume | None:
        found = _NUMBERED.fullmatch(spec)
        if not found:
            return None
        letter, nvme, mmc, number = found.groups()
        index = ord(letter) - ord("a") if letter else int(nvme or mmc)
        self.by_number.append(spec)
        if index >= len(self._disks):
            return None
        disk = self._disks[index]
        return self._named(partition_name(disk, int(number)) if number else disk)


def mapped_name(name: str) -> str:
    """`vg/lv` of device-mapper's `vg-lv`, in which a dash of a name is doubled; other names as they are."""
    group, mark, volume = name.replace("--", "\0").partition("-")
    return f"{group}/{volume}".replace("\0", "-") if mark else name


def _spaces(field: str) -> str:
    """fstab writes white space in octal."""
    return re.sub(r"\\(0[0-7]{2}|134)", lambda found: chr(int(found[1], 8)), field)
