"""What a libvirt domain's XML says beside its devices: machine, firmware, Secure Boot, console, memory.

Format: https://libvirt.org/formatdomain.html, "Operating system booting". The XML is hostile: it may have no document
type, so that it has no entities. Pure functions.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from appliance.errors import BadInventory
from images.hardware.parts import machine_type
from images.hardware.schema import fit_name, no_larger

__all__ = ["console_of", "is_secure", "is_uefi", "machine_of", "memory_of", "name_of", "parse"]

_MOST_XML = 1 << 20
_UNITS = {"b": 0, "bytes": 0, "k": 10, "kib": 10, "m": 20, "mib": 20, "g": 30, "gib": 30, "t": 40, "tib": 40}
# How Debian, SUSE and Fedora name files of UEFI variables that have Microsoft's keys.
_ENROLLED = re.compile(r"[._-]ms[._-]|VARS.*secboot")


def parse(xml: str, target: str) -> ET.Element:
    """The `<domain>`. Raises BadInventory when it is none, or larger than 1 MiB."""
    no_larger(xml, target, _MOST_XML)
    # Entities grow to gigabytes or read files, and need a document type; no definition has one.
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise BadInventory(target=target, field="document", reason="its XML has a document type, which is not allowed")
    try:
        root = ET.fromstring(xml)
    except (ET.ParseError, ValueError) as error:
        raise BadInventory(target=target, field="document", reason=f"it is not XML: {error}") from None
    if root.tag != "domain":
        raise BadInventory(target=target, field="document", reason=f"it is a <{root.tag[:40]}>, not a <domain>")
    return root


def name_of(root: ET.Element) -> str:
    """The domain's name, made fit for one of a target."""
    return fit_name((root.findtext("name") or "").strip(), "domain")


def machine_of(root: ET.Element, target: str) -> str:
    """Its machine type. Raises BadInventory when it is no x86_64 guest of QEMU."""
    kind = root.get("type", "")
    if kind not in ("kvm", "qemu", "hvf"):
        raise BadInventory(
            target=target, field="type", reason=f"a domain of type {kind[:40]!r} is not one of QEMU's",
            hint="take a profile, or save the output of `machine.sh` there",
        )  # fmt: skip
    element = root.find("os/type")
    if element is None or (element.text or "").strip() != "hvm":
        reason = "only fully virtual guests (hvm) have hardware of their own"
        raise BadInventory(target=target, field="os/type", reason=reason)
    arch = element.get("arch", "x86_64")
    if arch != "x86_64":
        reason = f"{arch[:40]} is not x86_64, the one architecture there is"
        raise BadInventory(target=target, field="os/type/@arch", reason=reason)
    return machine_type(element.get("machine", "pc"), target, "os/type/@machine")


def is_uefi(root: ET.Element) -> bool:
    loader = root.find("os/loader")
    if root.find("os[@firmware='efi']") is not None or (loader is not None and loader.get("type") == "pflash"):
        return True
    return loader is not None and bool(re.search(r"ovmf|edk2|uefi", loader.text or "", re.IGNORECASE))


def is_secure(root: ET.Element) -> bool:
    """Whether the firmware will refuse what is unsigned: it must have Secure Boot, and keys. Where the definition
    leaves it open we say yes: what is planned with signed parts starts either way."""
    features = {one.get("name", ""): one.get("enabled", "") for one in root.iterfind("os/firmware/feature")}
    if "no" in (features.get("secure-boot"), features.get("enrolled-keys")):
        return False
    loader, nvram = root.find("os/loader"), root.find("os/nvram")
    files = [] if loader is None else [loader.text or ""]
    files += [] if nvram is None else [nvram.get("template", "")]
    asked = features.get("secure-boot") == "yes" or (loader is not None and loader.get("secure") == "yes")
    return asked or any(_ENROLLED.search(one) for one in files)


def console_of(root: ET.Element) -> str:
    """The kernel's name of the first serial line, else of the first virtio console; empty when there is neither."""
    element = root.find("devices/serial")
    element = root.find("devices/console/target[@type='serial']/..") if element is None else element
    if element is not None:
        target = element.find("target")
        port = "0" if target is None else target.get("port", "0")
        return f"ttyS{port}" if re.fullmatch("[0-9]{1,2}", port) else "ttyS0"
    return "hvc0" if root.find("devices/console/target[@type='virtio']") is not None else ""


def memory_of(root: ET.Element, target: str) -> int:
    """In bytes; 0 when it does not say. Raises BadInventory."""
    element = root.find("memory")
    if element is None:
        return 0
    number, unit = (element.text or "").strip(), element.get("unit", "KiB").lower()
    if not re.fullmatch(r"[0-9]{1,12}", number) or unit not in _UNITS:
        raise BadInventory(target=target, field="memory", reason=f"{number[:40]!r} {unit[:10]} is no size of memory")
    return int(number) << _UNITS[unit]
