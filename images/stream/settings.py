"""What the initrd of a streamed image is told: `/rw/stream.conf`, and the programs of this folder.

    rw/stream       hook.sh         rw/keeper, rw/fill    keeper.sh, fill.sh        rw/tls/    the client's certificates
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from appliance.errors import ConfigError
from images.stream.layout import SECTOR, Disk, Layout
from images.template.settings import Settings

__all__ = ["MODULES", "Stream", "stream_conf", "with_stream"]

# Beside what `images.drivers.plan.Options(stream=True)` asks for: the link that waits, and the mirror.
MODULES = ("dm_multipath", "dm_round_robin", "dm_mirror")

_FOLDER = Path(__file__).parent
_PROGRAMS = {"rw/stream": "hook.sh", "rw/keeper": "keeper.sh", "rw/fill": "fill.sh"}
_TOOLS = ("nbd-client", "dmsetup", "blkid")
# Each link has two NBD devices, and the kernel makes 16; one link is for the control file.
MOST_DISKS = 7
PAGE = 4096
# What GRUB puts there is smaller.
_LEAST_GAP = 512 << 10


@dataclass(frozen=True, slots=True)
class Stream:
    """One session as its client sees it.

    `session` names it and its server's certificate. `address`, `port`: where the server is reached. `mode`: `stream`,
    or `copy` to write the local disks before the hand-over. `own` is the IPv4 address that the client uses for this
    link and nothing else, `dhcp` to be given one; `gateway` the way to a server that is not near it. `mac`: the card,
    else the first that has a link. `patience`: seconds without a server after which reads and writes fail; `timeout`:
    seconds without an answer after which a connection counts as broken. `start`: seconds after which the disks are
    filled even when the system has not said that it is up. `region`: sectors that are copied at once, a power of two.
    `local` maps a disk to the node or identity of the local one it goes to. `overwrite`: also one that is not empty;
    `blank`: a promise that all of them read as zeros. `tls`: certificates by file name; none for a link that anybody
    can read and change.
    """

    session: str
    address: str
    port: int
    layout: Layout
    mode: Literal["stream", "copy"] = "stream"
    own: str = "dhcp"
    gateway: str = ""
    mac: str = ""
    patience: int = 600
    timeout: int = 30
    start: int = 300
    region: int = 4096
    local: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    blank: bool = False
    tls: Mapping[str, bytes] = field(default_factory=dict)


def with_stream(settings: Settings, stream: Stream) -> Settings:
    """The settings of an image, and of its stream. Raises ConfigError for what cannot be told to a client."""
    extra = {path: (_FOLDER / name).read_bytes() for path, name in _PROGRAMS.items()}
    extra["rw/stream.conf"] = stream_conf(stream)
    extra |= {f"rw/tls/{name}": data for name, data in stream.tls.items()}
    tools = tuple(dict.fromkeys((*settings.tools, *_TOOLS)))
    return replace(settings, extra={**settings.extra, **extra}, tools=tools)


def stream_conf(stream: Stream) -> bytes:
    """The file `/rw/stream.conf`: variables for the shell, everything quoted."""
    _check(stream)
    layout = stream.layout
    own, gateway = _way(stream)
    values = {
        "SESSION": stream.session, "ADDRESS": stream.address, "PORT": stream.port, "MODE": stream.mode, "OWN": own,
        "GATEWAY": gateway, "MAC": stream.mac, "PATIENCE": stream.patience, "TIMEOUT": stream.timeout,
        "START": stream.start, "REGION": stream.region, "OVERWRITE": "yes" if stream.overwrite else "",
        "BLANK": "yes" if stream.blank else "", "ROOT": layout.root, "USR": layout.usr,
        "DISKS": " ".join(disk.name for disk in layout.disks),
        "SHOWN": " ".join(name for disk in layout.disks for name in _shown(disk)),
    }  # fmt: skip
    for disk in layout.disks:
        name = re.sub(r"[^A-Za-z0-9]", "_", disk.name)
        values[f"SECTORS_{name}"] = disk.size // SECTOR
        values[f"PARTS_{name}"] = " ".join(
            f"{part.name}:{part.number}:{part.offset // SECTOR}:{part.length // SECTOR}" for part in disk.parts
        )
        values[f"GAP_{name}"] = _gap(disk)
        values[f"LOCAL_{name}"] = stream.local.get(disk.name, "")
    return "".join(f"RWS_{name}={shlex.quote(str(value))}\n" for name, value in values.items()).encode()


def _gap(disk: Disk) -> int | str:
    """The page before the first partition, where a boot loader in the gap ends much earlier; nothing where there is no
    such gap."""
    first = min((part.offset for part in disk.parts), default=0)
    return first // PAGE - 1 if first >= _LEAST_GAP else ""


def _shown(disk: Disk) -> list[str]:
    """The maps that the client's own system sees as what they are: a disk with partitions only by these."""
    return [part.name for part in disk.parts] or [disk.name]


def _check(stream: Stream) -> None:
    names = {disk.name for disk in stream.layout.disks}
    if len(names) > MOST_DISKS:
        raise ConfigError(reason=f"{len(names)} disks cannot be streamed at once, only {MOST_DISKS}")
    for name in names:
        if not re.fullmatch(r"[a-z0-9]{1,16}", name):
            raise ConfigError(reason=f"disk {name!r} has a name that no device can have")
    if unknown := sorted(stream.local.keys() - names):
        raise ConfigError(reason=f"there is no disk {unknown[0]!r} to be put on {stream.local[unknown[0]]!r}")
    for what in stream.local.values():
        if not re.fullmatch(r"/dev/[A-Za-z0-9]+|[A-Za-z0-9._:-]+", what):
            raise ConfigError(reason=f"{what!r} names no local disk", hint="give a node (/dev/sda) or a serial number")


def _way(stream: Stream) -> tuple[str, str]:
    """The client's own address, and the gateway where the server is not near."""
    server = _ipv4(stream.address, "the server")
    if stream.own == "dhcp":
        return "dhcp", ""
    try:
        own = ipaddress.IPv4Interface(stream.own)
    except ValueError as error:
        raise ConfigError(reason=f"{stream.own!r} is no IPv4 address: {error}", hint="give ADDRESS/PREFIX") from error
    if server in own.network:
        return str(own.ip), ""
    if not stream.gateway:
        raise ConfigError(reason=f"{server} is not in {own.network}, and there is no gateway", hint="add --gateway")
    return str(own.ip), str(_ipv4(stream.gateway, "the gateway"))


def _ipv4(text: str, what: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError as error:
        raise ConfigError(reason=f"{what} has no IPv4 address {text!r}", hint="the initrd resolves no names") from error
