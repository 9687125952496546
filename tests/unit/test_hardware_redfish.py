"""Redfish documents: which shapes are read, and what they must have (P6-21, P6-25)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import BadInventory
from images import hardware
from images.model import Firmware

SYSTEM = "/redfish/v1/Systems/1"
NIC_PATH = f"{SYSTEM}/PCIeDevices/NIC/PCIeFunctions/0"


def function(path: str, **fields: object) -> dict[str, object]:
    return {"@odata.type": "#PCIeFunction.v1_5_0.PCIeFunction", "@odata.id": path, **fields}


RAID = function(
    f"{SYSTEM}/PCIeDevices/RAID/PCIeFunctions/0", Name="RAID", VendorId="0x1000", DeviceId="0x005d",
    SubsystemVendorId="0x1028", SubsystemId="0x1f49", ClassCode="0x010400", DeviceClass="MassStorageController",
)  # fmt: skip
CARD = function(
    NIC_PATH, VendorId="0x14E4", DeviceId="0x165F", SubsystemVendorId="0x1028", SubsystemId="0x08FF",
    ClassCode="0x020000",
)  # fmt: skip
COMPUTER = {
    "@odata.type": "#ComputerSystem.v1_20_0.ComputerSystem", "@odata.id": SYSTEM, "Model": "PowerEdge R640",
    "Boot": {"BootSourceOverrideMode": "UEFI"}, "MemorySummary": {"TotalSystemMemoryGiB": 96},
    "TrustedModules": [{"InterfaceType": "TPM2_0", "Status": {"State": "Enabled"}}],
}  # fmt: skip
SECURE = {
    "@odata.type": "#SecureBoot.v1_1_0.SecureBoot", "SecureBootEnable": True, "SecureBootCurrentBoot": "Enabled"
}
INTERFACE = {"@odata.type": "#EthernetInterface.v1_9_0.EthernetInterface", "MACAddress": "B0-26-28-00-11-22"}
ALIASES = [
    "pci:v00001000d0000005Dsv00001028sd00001F49bc01sc04i00",
    "pci:v000014E4d0000165Fsv00001028sd000008FFbc02sc00i00",
]


@pytest.mark.parametrize(
    "document",
    [
        [COMPUTER, RAID, CARD, SECURE, INTERFACE],
        {"Systems": {**COMPUTER, "Secure": SECURE, "PCIeFunctions": {"Members": [RAID, CARD]}, "More": [INTERFACE]}},
        dict(zip("abcdef", [COMPUTER, RAID, CARD, CARD, SECURE, INTERFACE], strict=True)),
    ],
    ids=["list", "expanded", "mock-up"],
)
def test_a_machine_that_is_off(document):
    """P6-21: firmware, Secure Boot, TPM, memory, exact aliases, the MAC address; each function once."""
    found = hardware.from_redfish(json.dumps(document))
    assert (found.name, found.source, found.firmware) == ("poweredge-r640", "redfish", Firmware.UEFI)
    assert found.secure_boot and found.tpm and found.memory_bytes == 96 << 30
    assert [one.modalias for one in found.devices] == ALIASES
    assert found.devices[0].description == "RAID" and found.devices[1].slot == NIC_PATH
    assert [(nic.modalias, nic.mac, nic.slot) for nic in found.nics] == [(ALIASES[1], "b0:26:28:00:11:22", NIC_PATH)]
    assert found.notes == () and hardware.load(hardware.dump(found)) == found


def test_a_mac_address_goes_to_the_card_that_the_document_names():
    other = function(f"{SYSTEM}/x/1", VendorId="8086h", DeviceId="1521", ClassCode="0x020000")
    tie = {
        "@odata.type": "#NetworkDeviceFunction.v1_7_0.NetworkDeviceFunction",
        "Ethernet": {"MACAddress": "02:00:00:00:00:02", "PermanentMACAddress": "b0:26:28:00:00:02"},
        "Links": {"PCIeFunction": {"@odata.id": f"{SYSTEM}/x/1"}},
    }
    document = [COMPUTER, CARD, other, INTERFACE, tie]
    found = hardware.from_redfish(json.dumps(document))
    assert {nic.slot: nic.mac for nic in found.nics} == {
        NIC_PATH: "b0:26:28:00:11:22", f"{SYSTEM}/x/1": "b0:26:28:00:00:02"
    }  # fmt: skip
    found = hardware.from_redfish(json.dumps(document[:-1]))
    assert [nic.mac for nic in found.nics] == ["b0:26:28:00:11:22", ""]
    assert any("paired in their order" in note for note in found.notes)


def test_a_class_without_its_last_byte_or_by_word_only():
    usb = function("/u", VendorId="0x8086", DeviceId="0xa36d", ClassCode="0x0c03")
    word = function("/n", VendorId="0x8086", DeviceId="0x1521", DeviceClass="NetworkController")
    found = hardware.from_redfish(json.dumps([COMPUTER, usb, word]))
    assert [one.modalias[-3:] for one in found.devices if one.slot == "/u"] == ["i30", "i20", "i10", "i00"]
    assert [nic.modalias for nic in found.nics] == ["pci:v00008086d00001521sv00000000sd00000000bc02sc00i00"]


@pytest.mark.parametrize(
    ("boot", "given_firmware", "expected"),
    [
        ({"BootSourceOverrideMode": "Legacy"}, None, Firmware.BIOS),
        ({"BootSourceOverrideMode": "UEFI"}, Firmware.BIOS, Firmware.BIOS),
        ({}, Firmware.UEFI, Firmware.UEFI),
    ],
)
def test_the_firmware(boot, given_firmware, expected):
    text = json.dumps([{**COMPUTER, "Boot": boot}, RAID])
    assert hardware.from_redfish(text, firmware=given_firmware).firmware is expected


@pytest.mark.parametrize(
    ("document", "field", "reason"),
    [
        ([COMPUTER], "document", "no PCIe function"),
        ([COMPUTER, {**RAID, "DeviceId": "0x10000"}], "[1].DeviceId", "0x10000"),
        ({"a": {"b": [COMPUTER, {**RAID, "VendorId": "Dell"}]}}, "a.b[1].VendorId", "Dell"),
        ([COMPUTER, {**RAID, "ClassCode": "storage"}], "[1].ClassCode", "storage"),
        ([{**COMPUTER, "Boot": None}, RAID], "Boot.BootSourceOverrideMode", "UEFI from BIOS"),
        (3, "document", "no PCIe function"),
    ],
)
def test_what_cannot_be_used_is_named(document, field, reason):
    with pytest.raises(BadInventory) as caught:
        hardware.from_redfish(json.dumps(document), target="t")
    assert caught.value.fields["field"] == field and reason in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, " " * (17 << 20)], ids=["empty", "half", "deep", "large"])
def test_hostile_text_is_refused(text):
    with pytest.raises(BadInventory):
        hardware.from_redfish(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["VendorId", "DeviceId", "ClassCode", "Boot", "Links", "Ethernet", "MACAddress", "@odata.type",
                         "TrustedModules", "MemorySummary", "Model", "SystemType", "PowerState", "NetDevFuncType"]),
        inner, max_size=6),
)  # fmt: skip


@given(json_values)
def test_any_document_is_an_inventory_or_refused(document):
    try:
        hardware.from_redfish(json.dumps([RAID, document]), firmware=Firmware.UEFI)
    except BadInventory as error:
        assert error.fields["field"]


@pytest.mark.parametrize("junk", [3, "x", [3], {"a": 1}, None, True])
def test_a_known_object_with_junk_in_its_fields(junk):
    fields = ("TrustedModules", "MemorySummary", "Boot", "Model", "HostName", "Id", "Links", "Ethernet", "MACAddress")
    kinds = ("ComputerSystem", "NetworkDeviceFunction", "EthernetInterface", "SecureBoot")
    objects = [{"@odata.type": f"#{kind}.v1_0_0.{kind}", **dict.fromkeys(fields, junk)} for kind in kinds]
    found = hardware.from_redfish(json.dumps([RAID, CARD, *objects]), target="t", firmware=Firmware.BIOS)
    assert len(found.devices) == 2 and not found.tpm and found.nics[0].mac == ""
