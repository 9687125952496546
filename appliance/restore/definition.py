"""The definition of a domain at a point, made fit for a new domain beside the old one."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

from appliance.errors import NotSupported
from appliance.restore.unshared import take_out

__all__ = ["for_new_domain"]

# What a running domain's XML says about the run it was taken in.
_OF_A_RUN = ("uuid", "seclabel", "resource")


def for_new_domain(
    xml: str, name: str, files: Mapping[str, tuple[Path, str]], nvram: Path | None = None, tpm: bool = False,
    uuid: str = "",
) -> tuple[str, list[str]]:  # fmt: skip
    """(definition, what had to be left out). `files` are target → (path, format) of the new disks; a hard disk that is
    not among them is left out. Name, disks and NVRAM are new; UUID and MAC addresses are left to libvirt, and what else
    two domains cannot share (see `unshared`) is taken out, so that both can run side by side. Without `tpm` an emulated
    TPM begins empty. With `uuid` it is that domain again, which is gone.

    Raises NotSupported when the point has no domain XML (a QEMU that no libvirt manages).
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        root = ElementTree.Element("none")
    if root.tag != "domain":
        raise NotSupported(
            object=f"new domain {name!r}",
            reason="the point has no libvirt definition",
            hint="restore its disks without --name",
        )
    root.attrib.pop("id", None)
    for tag in _OF_A_RUN:
        for element in root.findall(tag):
            root.remove(element)
    _set(root, "name", name)
    if uuid:
        _set(root, "uuid", uuid)
    left_out = _disks(root, files)
    for interface in root.iterfind("devices/interface"):
        _drop(interface, "mac", "target", "alias")
    _nvram(root, nvram)
    left_out += take_out(root)
    if root.find("devices/tpm") is not None and not tpm:
        left_out.append("the TPM's state: the new domain's TPM begins empty")
    return ElementTree.tostring(root, encoding="unicode"), left_out


def _disks(root: ElementTree.Element, files: Mapping[str, tuple[Path, str]]) -> list[str]:
    left_out = []
    devices = root.find("devices")
    for disk in list(devices.iterfind("disk")) if devices is not None else []:
        assert devices is not None
        target = disk.find("target")
        name = target.get("dev", "") if target is not None else ""
        if disk.get("device", "disk") != "disk":
            continue
        if name not in files:
            devices.remove(disk)
            left_out.append(f"disk {name}: it is not in the point or was not asked for")
            continue
        path, image_format = files[name]
        _drop(disk, "source", "backingStore", "mirror", "alias", "auth", "encryption")
        disk.set("type", "file")
        disk.attrib.pop("snapshot", None)
        disk.insert(0, ElementTree.Element("source", file=str(path)))
        driver = disk.find("driver")
        if driver is None:
            driver = ElementTree.SubElement(disk, "driver", name="qemu")
        driver.set("type", image_format)
    return left_out


def _nvram(root: ElementTree.Element, path: Path | None) -> None:
    """Its own copy; without one libvirt makes an empty one from the template."""
    element = root.find("os/nvram")
    if element is None:
        return
    for child in list(element):
        element.remove(child)
    element.attrib.pop("type", None)
    element.text = None if path is None else str(path)


def _set(root: ElementTree.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ElementTree.SubElement(root, tag)
    element.text = text


def _drop(element: ElementTree.Element, *tags: str) -> None:
    for tag in tags:
        for child in element.findall(tag):
            element.remove(child)
