"""The definition of a domain with a target's hardware, as text."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from appliance.errors import NotSupported
from appliance.restore.newhardware import (
    NewDisk,
    for_hardware,
    has_drive,
    has_medium,
    macs,
    wanted_disks,
    without_medium,
)

XML = """<domain type="kvm" id="7"><name>spare</name><uuid>0ad6c641-c9ed-4eb8-8756-6f488ee35fd8</uuid>
<os><type machine="{machine}">hvm</type><nvram>/var/spare.fd</nvram><boot dev="hd"/></os><devices>
<disk type="file" device="disk"><source file="/old.qcow2"/><target dev="sda" bus="sata"/><boot order="1"/>
<address type="drive" unit="3"/></disk>
<disk type="file" device="cdrom"><target dev="sdb" bus="sata"/></disk>
<interface type="network"><mac address="52:54:00:AA:00:01"/><target dev="vnet3"/></interface><interface type="user"/>
<serial type="unix"><source mode="bind" path="/run/spare.sock"/><log file="/var/log/spare.log"/></serial>
</devices></domain>"""
Q35 = XML.format(machine="pc-q35-7.2")
MEDIUM = Path("/images/rewind.iso")


def made(xml=Q35, disks=None, **options):
    disks = disks or {"sda": NewDisk(Path("/new/a.qcow2"), "vda", Path("/run/view.sock"))}
    addresses = ["52:54:00:00:00:01", "52:54:00:00:00:02"]
    return ET.fromstring(for_hardware(xml, "twin", disks, MEDIUM, addresses, **options))


def test_the_disks_are_the_points_own_over_the_view():
    """P6-14: in the place of the target's disk; its own file is not touched."""
    root = made()
    (disk,) = root.findall("devices/disk[@device='disk']")
    assert disk.find("source").get("file") == "/new/a.qcow2"
    assert disk.find("target").attrib == {"dev": "sda", "bus": "sata"}
    assert disk.find("address").get("unit") == "3"
    backing = disk.find("backingStore/source")
    assert (backing.get("protocol"), backing.get("name")) == ("nbd", "vda")
    assert backing.find("host").get("socket") == "/run/view.sock"
    assert backing.find("reconnect").get("delay") == "10"
    assert disk.find("driver").get("error_policy") == "stop"
    assert "/old.qcow2" not in ET.tostring(root, encoding="unicode")


def test_a_sas_disk_gets_a_name():
    """P6-17: without one Linux's driver for the LSI SAS 1068 does not see it; other controllers need none."""
    places = '<address type="drive" controller="{}"/>'
    sas = Q35.replace('bus="sata"/><boot', 'bus="scsi"/><boot').replace('<address type="drive" unit="3"/>', places)
    sas = sas.replace("</devices>", '<controller type="scsi" index="1" model="lsisas1068"/></devices>')
    (named,) = made(sas.format("1")).findall("devices/disk[@device='disk']")
    assert len(named.find("wwn").text) == 16 and named.find("wwn").text.startswith("3")
    for xml in (Q35, sas.format("0")):
        assert made(xml).find("devices/disk/wwn") is None


def test_it_starts_from_the_medium_and_then_from_its_disk():
    root = made()
    disks = root.findall("devices/disk[boot]")
    orders = {one.find("source").get("file"): one.find("boot").get("order") for one in disks}
    assert orders == {str(MEDIUM): "1", "/new/a.qcow2": "2"}
    assert root.find("os/boot") is None


def test_what_two_domains_cannot_share_is_left_to_libvirt():
    """P6-24: identity, variables, sockets, logs; network addresses as they were asked for."""
    root = made()
    assert root.find("name").text == "twin"
    text = ET.tostring(root, encoding="unicode")
    for word in ("0ad6c641", "/var/spare.fd", "/run/spare.sock", "/var/log/spare.log", "vnet3"):
        assert word not in text
    cards = [card.find("mac").get("address") for card in root.findall("devices/interface")]
    assert cards == ["52:54:00:00:00:01", "52:54:00:00:00:02"]
    assert macs(Q35, "twin") == ["52:54:00:aa:00:01", ""]
    assert "/run/spare.sock" in ET.tostring(made(of_a_domain=False), encoding="unicode")


def test_more_disks_than_the_target_has_get_places_that_are_free():
    assert wanted_disks(Q35, 3, "twin") == ["sda", "sdc", "sdd"]
    with pytest.raises(NotSupported, match="no place for 40 disks"):
        wanted_disks(Q35, 40, "twin")


CD = '<disk device="cdrom"><target {}/>{}</disk>'


@pytest.mark.parametrize(
    ("machine", "others", "place", "name"),
    [
        ("q35", [], "0 0 0", "sdc"),  # sda has unit 3, sdb by its name unit 1
        # A letter is one disk's on all buses.
        ("q35", [('dev="sdc" bus="scsi"', ""), ('dev="sdd" bus="sata"', "0 0")], "0 0 2", "sde"),
        ("q35", [(f'dev="sd{one}" bus="sata"', "") for one in "acef"], "1 0 0", "sdg"),
        ("pc", [], "0 1 0", "hdc"),
        ("pc", [('dev="hda" bus="ide"', "1 0")], "0 1 1", "hdd"),
        ("pc", [('dev="hdc"', "")], "0 1 1", "hdd"),
    ],
)
def test_the_medium_is_on_a_controller_that_the_target_has(machine, others, place, name):
    """P6-24: libvirt adds controllers up to that of a late letter, and the guest sees hardware that no plan knows."""
    places = [(one, '<address type="drive" bus="{}" unit="{}"/>'.format(*where.split()) if where else "")
              for one, where in others]  # fmt: skip
    more = "".join(CD.format(*one) for one in places)
    root = made(XML.format(machine=machine).replace("</devices>", f"{more}</devices>"))
    (medium,) = (one for one in root.findall("devices/disk") if one.find(f"source[@file='{MEDIUM}']") is not None)
    where = medium.find("address[@type='drive']")
    assert " ".join(where.get(key) for key in ("controller", "bus", "unit")) == place
    assert medium.find("target").get("dev") == name


def test_a_bus_without_a_place_for_the_medium_is_told():
    xml = XML.format(machine="pc").replace('dev="sdb" bus="sata"', 'dev="hda" bus="ide"')
    more = "".join(f'<disk device="cdrom"><target dev="hd{one}" bus="ide"/></disk>' for one in "bcd")
    with pytest.raises(NotSupported, match="ide bus has no place"):
        made(xml.replace("</devices>", f"{more}</devices>"))


@pytest.mark.parametrize("xml", ["", "<network/>", "<domain/>", "no xml"])
def test_what_is_no_domain_is_refused(xml):
    with pytest.raises(NotSupported, match="no libvirt definition"):
        wanted_disks(xml, 1, "twin")


def orders(xml):
    """(target or device, order) of what a definition starts from, the first one first."""
    found = [one for one in ET.fromstring(xml).find("devices") if one.find("boot") is not None]
    names = {int(one.find("boot").get("order")): one.find("target").get("dev") for one in found}
    assert len(names) == len(found)
    return [names[order] for order in sorted(names)]


@pytest.mark.parametrize("ejected", [False, True])
@pytest.mark.parametrize(("start", "wanted"), [("sda", ["sda"]), ("sdc", ["sdc", "sda"])])
def test_the_medium_goes_when_it_is_needed_no_more(ejected, start, wanted):
    """P6-19: the disk with the loader is the first to start from then, also where somebody has ejected the medium.
    Other CDs stay, one from the medium's folder, too, and a second time there is nothing to take."""
    disks = {name: NewDisk(Path(f"/new/{name}.qcow2"), "vda") for name in ("sda", "sdc")}
    text = ET.tostring(made(disks=disks), encoding="unicode")
    drivers = f'<disk device="cdrom"><source file="{MEDIUM.parent}/drivers.iso"/><target dev="sdx"/></disk>'
    text = text.replace("</devices>", f"{drivers}</devices>")
    if ejected:
        text = text.replace(f'<source file="{MEDIUM}" />', "")
    assert has_drive(text, "twin", MEDIUM) and has_medium(text, "twin", MEDIUM) is not ejected
    found = without_medium(text, "twin", MEDIUM, start)
    assert orders(found) == wanted and str(MEDIUM) not in found and "drivers.iso" in found
    assert len(ET.fromstring(found).findall("devices/disk[@device='cdrom']")) == 2
    assert not has_drive(found, "twin", MEDIUM) and without_medium(found, "twin", MEDIUM, start) == found
    assert not has_medium(text, "twin", Path("/elsewhere/rewind.iso"))
    with pytest.raises(NotSupported, match="has no disk 'sdx' to start from"):
        without_medium(text, "twin", MEDIUM, "sdx")


def test_a_disk_with_the_loader_starts_first_also_without_the_drive():
    """P6-19: what somebody else has put into the order comes behind it; a machine without any is left alone."""
    card = '<interface type="user"><target dev="net0"/><boot order="{}"/></interface>'
    text = '<domain><devices><disk device="disk"><target dev="sda"/></disk>{}</devices></domain>'
    for more, wanted in ((card.format(1), ["sda", "net0"]), (card.format(4), ["sda", "net0"]), ("", [])):
        found = without_medium(text.format(more), "twin", MEDIUM, "sda")
        assert orders(found) == wanted


def test_without_a_medium_it_starts_from_its_first_disk():
    """A Windows: the target's own CD drive stays, and starts nothing."""
    xml = """<domain><name>rack</name><os><type machine="pc">hvm</type><boot dev="cdrom"/></os><devices>
    <disk device="cdrom"><target dev="hdc" bus="ide"/><boot order="1"/></disk>
    <disk><source file="/old"/><target dev="sda" bus="sata"/></disk></devices></domain>"""
    root = ET.fromstring(for_hardware(xml, "new", {"sda": NewDisk(Path("/new"), "vda")}, None, []))
    drive, disk = root.findall("devices/disk")
    assert drive.find("boot") is None and root.find("os/boot") is None
    assert disk.find("boot").get("order") == "1" and disk.find("source").get("file") == "/new"
