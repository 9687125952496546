"""What libvirt's domain XML says about disks, firmware and TPM; and which process runs the domain."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from appliance.hypervisor.base import Disk

__all__ = ["Definition", "DiskElement", "merged", "pid_of"]


@dataclass(frozen=True, slots=True)
class DiskElement:
    """A `<disk>`: `source` is its path, empty for one over a network; `alias` exists while the domain runs."""

    target: str
    bus: str
    alias: str
    source: str
    format: str
    read_only: bool
    refusal: str


class Definition:
    """A parsed domain XML."""

    def __init__(self, text: str) -> None:
        self._root = ET.fromstring(text)

    def disks(self) -> list[DiskElement]:
        """Hard disks only, in the order of the XML."""
        return [
            _disk(one) for one in self._root.iterfind("devices/disk") if one.get("device", "disk") in ("disk", "lun")
        ]

    def backed(self, target: str) -> bool | None:
        """Whether this disk's top image is known to have something below it; None when there is no such disk. libvirt
        ends a chain by an empty element."""
        for disk in self._root.iterfind("devices/disk"):
            if (name := disk.find("target")) is not None and name.get("dev") == target:
                below = disk.find("backingStore")
                return below is not None and len(below) > 0
        return None

    def nvram(self) -> Path | None:
        """The UEFI variable store's file."""
        found = self._root.find("os/nvram")
        if found is None:
            return None
        source = found.find("source")
        text = source.get("file") if source is not None else (found.text or "").strip()
        return Path(text) if text else None

    def has_tpm(self) -> bool:
        """Whether there is a TPM that swtpm emulates, so that it has a state of its own."""
        return self._root.find("devices/tpm/backend[@type='emulator']") is not None

    def tpm_source(self) -> Path | None:
        """Where newer libvirt was told to keep it."""
        found = self._root.find("devices/tpm/backend/source[@type='dir']")
        return Path(found.get("path", "")) if found is not None else None

    def agent_connected(self) -> bool:
        """Whether a guest agent holds the other end of its channel now."""
        path = "devices/channel/target[@name='org.qemu.guest_agent.0']"
        return any(one.get("state") == "connected" for one in self._root.iterfind(path))


def _disk(element: ET.Element) -> DiskElement:
    def get(path: str, name: str) -> str:
        found = element.find(path)
        return found.get(name, "") if found is not None else ""

    source = get("source", "file") or get("source", "dev")
    return DiskElement(
        target=get("target", "dev"),
        bus=get("target", "bus"),
        alias=get("alias", "name"),
        source=source,
        format=get("driver", "type") or "raw",
        read_only=element.find("readonly") is not None,
        refusal=_refusal(element, source),
    )


def _refusal(element: ET.Element, source: str) -> str:
    if element.get("device") == "lun":
        return "it is a SCSI device passed through"
    if element.find("shareable") is not None:
        return "it is shareable: another guest may write to it unseen"
    if element.find("transient") is not None:
        return "it is transient: what is written to it is thrown away"
    if element.find("encryption") is not None or element.find("source/encryption") is not None:
        return "it is encrypted by QEMU: its scratch data would be written in clear"
    if not source:
        return f"disks of type {element.get('type')} are not supported, only files and block devices"
    return ""


def merged(one: DiskElement, seen: Disk | None) -> Disk:
    """The disk as QEMU has it, with libvirt's words where those say more."""
    if seen is None:
        refusal = one.refusal or ("" if not one.alias else "QEMU does not see its blocks")
        read_only = "it is read-only" if one.read_only else ""
        return Disk(
            target=one.target, source=one.source, format=one.format, size=0, bus=one.bus, read_only=one.read_only,
            refusal=read_only or refusal,
        )  # fmt: skip
    refusal = one.refusal or seen.refusal
    if not refusal and not seen.node.startswith("libvirt-"):
        refusal = f"its device sits on {seen.node}, which is not libvirt's"
    return replace(seen, source=one.source or seen.source, bus=one.bus or seen.bus, refusal=refusal)


def pid_of(name: str, uuid: str, uri: str) -> int | None:
    """The QEMU process of a running domain: libvirt's own note of it, else the one that was started with the UUID."""
    if urlsplit(uri).path == "/system":
        try:
            return int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
        except (OSError, ValueError):
            pass
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"-uuid" in words and uuid.encode() in words:
                return int(entry.name)
    return None
