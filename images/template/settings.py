"""What the initrd's init and the client's system are told by an image, beside the kernel's command line.

For init: shell variables in `/rw/conf`; names of network cards in `/rw/nics`. For the client's system: files that are
laid into /run, where they win over those of the disk and are gone after the next start:

    /run/systemd/network/10-rewind-NAME.link    a card keeps the name that the client's configuration speaks of
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from appliance.errors import ImageError
from images.model import Layer, Plan

__all__ = ["Settings", "conf", "nics", "settings_for"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # of an interface: the kernel's IFNAMSIZ, and nothing a shell acts on
# Of an opened container and of its header: words for init's shell and for cryptsetup, and no colon between them.
_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._@=-]{0,126}")
_UUID = re.compile(r"[0-9A-Za-z-]{1,40}")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Settings:
    """`run`: files for /run by relative path. `extra`: programs for the initrd itself (`rw/stream`) by relative path,
    and the `tools` of the template that they use. `wait_seconds`: how long a root may take to appear;
    `linger_seconds`: how long a failure stays to be read, before `on_failure`."""

    run: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, bytes] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    wait_seconds: int = 60
    linger_seconds: int = 60
    on_failure: Literal["poweroff", "reboot"] = "poweroff"


def settings_for(plan: Plan) -> Settings:
    """The settings that a plan asks for. Raises ImageError for a name that is no interface's."""
    run = {f"systemd/network/10-rewind-{name}.link": _link(mac, name) for mac, name in _renames(plan)}
    return Settings(run=run)


def conf(plan: Plan, settings: Settings) -> bytes:
    """The file `/rw/conf`. What comes from the guest is quoted: it is a value for the shell, whatever is in it. Raises
    ImageError for what the shell would have to split and could not."""
    root = plan.client.root
    above = [layer.value for layer in root.layers if layer is not Layer.PARTITION]
    values = {
        "LAYERS": " ".join(above),
        "VOLUME": root.volume,
        "LUKS": " ".join(_sealed(plan)) if Layer.LUKS in root.layers else "",
        "ROOT": root.spec,
        "FLAGS": root.flags,
        "FS": root.fs,
        "USR": _usr(plan),
        "WAIT": str(settings.wait_seconds),
        "LINGER": str(settings.linger_seconds),
        "FAIL": settings.on_failure,
    }
    return "".join(f"RW_{name}={shlex.quote(value)}\n" for name, value in values.items()).encode()


def nics(plan: Plan) -> bytes:
    """The file `/rw/nics`."""
    return "".join(f"{mac} {name}\n" for mac, name in _renames(plan)).encode()


def _renames(plan: Plan) -> list[tuple[str, str]]:
    for mac, name in plan.rename.items():
        if not _NAME.fullmatch(name) or name in (".", "..") or not _MAC.fullmatch(mac):
            raise ImageError(reason=f"network card {mac!r} cannot have the name {name!r}")
    return sorted(plan.rename.items())


def _link(mac: str, name: str) -> bytes:
    return f"[Match]\nMACAddress={mac}\n\n[Link]\nName={name}\n".encode()


def _sealed(plan: Plan) -> list[str]:
    """`NAME:UUID=…` of what is below the root and /usr. Other lines of crypttab are for the client's own system, which
    has the files with their keys."""
    for name, uuid in plan.client.root.containers:
        if not _CONTAINER.fullmatch(name) or not _UUID.fullmatch(uuid):
            raise ImageError(reason=f"an encrypted container cannot have the name {name!r} and the UUID {uuid!r}")
    return [f"{name}:UUID={uuid}" for name, uuid in plan.client.root.containers]


def _usr(plan: Plan) -> str:
    """A /usr of its own has to be there before the client's init starts."""
    for mount in plan.client.fstab:
        if mount.where == "/usr" and "noauto" not in mount.options:
            flags = [one for one in mount.options if one not in ("defaults", "rw", "ro", "auto") and "=" in one]
            words = (mount.spec, mount.fs, ",".join(one for one in flags if not one.startswith("x-")))
            if re.search(r"[\s*?\[\]\\]", "".join(words)):
                raise ImageError(reason=f"/usr on {mount.spec!r} ({mount.fs}) has a word that init cannot be told")
            return " ".join(words)
    return ""
