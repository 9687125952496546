"""An inventory as text: what is refused, and that the error names the field (P6-09, P6-21)."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import BadInventory
from images import hardware
from images.hardware import schema
from images.model import Device, Firmware, Inventory, Nic

NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
CARD = "pci:v00008086d000010D3sv00000000sd00000000bc02sc00i00"
GOOD = {
    "name": "t1", "source": "script", "firmware": "uefi", "secure_boot": True, "memory_bytes": 1 << 40,
    "devices": [{"modalias": NVME, "slot": "0000:02:00.0", "carries": ["vda", "vdb"]}, {"modalias": CARD}],
    "nics": [{"modalias": CARD, "mac": "52:54:00:00:00:01"}],
}  # fmt: skip

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30)
aliases = st.from_regex(r"[a-z0-9_]{1,8}:[A-Za-z0-9*,.:]{0,40}", fullmatch=True)
inventories = st.builds(
    Inventory,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True),
    source=st.sampled_from(["xml", "qemu", "script", "redfish", "profile"]),
    firmware=st.sampled_from(Firmware),
    secure_boot=st.booleans(),
    devices=st.lists(
        st.builds(Device, modalias=aliases, slot=texts, description=texts, carries=st.lists(texts).map(tuple)),
        max_size=5,
    ).map(tuple),
    nics=st.lists(st.builds(Nic, modalias=aliases, slot=texts), max_size=3).map(tuple),
    memory_bytes=st.integers(0, 1 << 60),
    notes=st.lists(texts, max_size=3).map(tuple),
)


@given(inventories)
def test_what_is_written_is_read_again(inventory):
    """P6-21: an inventory is kept as text and comes back equal; equal ones have equal text."""
    text = schema.dump(inventory)
    assert schema.load(text) == inventory
    assert schema.dump(schema.load(text)) == text


def test_yaml_and_json_give_the_same_and_the_name_can_be_given():
    found = schema.load(json.dumps(GOOD), target="other")
    yaml = f"""
name: t1
source: script
firmware: uefi
secure_boot: true
memory_bytes: {1 << 40}
devices:
  - {{modalias: "{NVME}", slot: "0000:02:00.0", carries: [vda, vdb]}}
  - modalias: "{CARD}"
nics: [{{modalias: "{CARD}", mac: "52:54:00:00:00:01"}}]
"""
    assert schema.load(yaml, target="other") == found
    assert found.name == "other" and found.devices[0].carries == ("vda", "vdb") and found.firmware is Firmware.UEFI


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"devices": [*GOOD["devices"], {"modalias": "no alias"}]}, "devices[2].modalias", "no alias"),
        ({"devices": [{"modalias": NVME, "speed": 3}]}, "devices[0].speed", "no such field"),
        ({"devices": [{"slot": "1"}]}, "devices[0].modalias", "missing"),
        ({"devices": "all"}, "devices", "'all'"),
        ({"nics": [{"modalias": CARD, "mac": "52:54:00:00:00"}]}, "nics[0].mac", "52:54:00:00:00"),
        ({"nics": [{"modalias": CARD, "mac": "52:54:00:AA:00:01"}]}, "nics[0].mac", "52:54:00:AA:00:01"),
        ({"firmware": "openfirmware"}, "firmware", "openfirmware"),
        ({"arch": "aarch64"}, "arch", "aarch64"),
        ({"secure_boot": "no"}, "secure_boot", "'no'"),
        ({"memory_bytes": -1}, "memory_bytes", "-1"),
        ({"name": "../../etc"}, "name", "../../etc"),
        ({"colour": "red"}, "colour", "no such field"),
        ({"notes": ["x" * 5000]}, "notes[0]", "5000"),
        ({"devices": [{"modalias": "pci:" + "v" * 5000}]}, "devices[0]", "5004"),
        ({"devices": [{"modalias": NVME}] * 8193}, "devices", "8193"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_and_the_value(change, field, reason):
    with pytest.raises(BadInventory) as caught:
        schema.load(json.dumps({**GOOD, **change}))
    assert caught.value.fields["field"] == field
    assert reason in str(caught.value)


def test_what_a_pattern_asks_for_is_said_in_words():
    """P6-21: of each that the model has; a regular expression is no sentence."""
    fields = [(name, field) for one in (Inventory, Device, Nic) for name, field in one.model_fields.items()]
    patterns = {name: data.pattern for name, field in fields for data in field.metadata if hasattr(data, "pattern")}
    assert set(patterns) == {"name", "modalias", "mac"}
    for change in ({"name": "Rack 7"}, {"devices": [{"modalias": "x"}]}, {"nics": [{"modalias": CARD, "mac": "x"}]}):
        with pytest.raises(BadInventory, match="it has to be ") as told:
            schema.check(GOOD | change)
        assert not any(pattern in str(told.value) for pattern in patterns.values())
        assert ("name" in change) == bool(told.value.hint)
    with pytest.raises(BadInventory) as told:
        schema.check(GOOD, target="Rack 7")
    assert re.findall("'(.*)'", told.value.hint) == ["rack-7"]


BOMB = "a: &a [1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b]\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "mapping"),
        ("[]", "mapping"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (BOMB, "alias"),
        ("- " * 5000 + "x", "levels"),
        ("a: !!python/object/apply:os.system [id]", "neither JSON nor YAML"),
        ("name: 2024-01-01\nfirmware: 2024-01-01", "does not know"),
        ("\x00", "neither JSON nor YAML"),
        ("{" + " " * schema.MOST_TEXT, "characters"),
        ("#" * (300 << 10), "characters"),
    ],
    ids=["empty", "list", "half", "deep", "bomb", "deep-yaml", "python", "date", "nul", "large", "large-yaml"],
)
def test_hostile_text_is_refused_at_once(text, reason):
    with pytest.raises(BadInventory, match=reason):
        schema.load(text)


@given(st.text(max_size=300))
def test_any_text_is_an_inventory_or_refused(text):
    try:
        schema.load(text)
    except BadInventory as error:
        assert error.fields["field"] and error.fields["reason"]


def test_only_the_output_of_the_script_passes_for_it():
    assert hardware.from_script_output(json.dumps(GOOD), target="box").name == "box"
    with pytest.raises(BadInventory, match=r"machine\.sh"):
        hardware.from_script_output(json.dumps({**GOOD, "source": "profile"}))
