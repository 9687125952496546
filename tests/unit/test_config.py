"""Home and settings."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import fields

import pytest

from appliance.config import Home, Settings, load_settings, write_json
from appliance.errors import ConfigError


def test_settings_are_merged_in_order(tmp_path):
    main = tmp_path / "rewind.yaml"
    main.write_text("uri: qemu:///one\nrate_limit: 5\ncbw_timeout: 20\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/20.yaml").write_text("rate_limit: 7\n")
    (tmp_path / "conf.d/10.yaml").write_text("rate_limit: 6\n")
    home = Home(tmp_path / "home")
    home.create()
    (home.path / "rewind.yaml").write_text("cbw_timeout: 30\n")
    found = load_settings(home, main)
    assert (found.uri, found.rate_limit, found.cbw_timeout) == ("qemu:///one", 7, 30)


def test_without_files_the_defaults_hold(tmp_path):
    assert load_settings(Home(tmp_path), tmp_path / "none.yaml") == Settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("uri_: x", "'uri_'"),
        ("cbw_timeout: soon", "'cbw_timeout'"),
        ("cbw_timeout: 0", "'cbw_timeout'"),
        ("- a\n- b\n", "not a list of settings"),
        ("a: [", "cannot read"),
    ],
)
def test_a_bad_setting_names_the_file_and_the_key(tmp_path, text, says):
    """A12: an unknown key is an error, not a silence."""
    main = tmp_path / "rewind.yaml"
    main.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(Home(tmp_path / "home"), main)
    assert says in caught.value.message
    assert str(main) in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("setting", [one for one in fields(Settings) if one.metadata], ids=lambda one: one.name)
def test_a_setting_has_its_limits(tmp_path, setting):
    """A12: the default is inside, what is beyond is refused, and what is refused is told with its limit."""
    main = tmp_path / "rewind.yaml"
    home = Home(tmp_path / "home")
    main.write_text(f"{setting.name}: {setting.default}\n")
    assert load_settings(home, main) == Settings()
    for word, limit in setting.metadata.items():
        beyond = {"ge": limit - 1, "gt": limit, "le": limit + 1}[word]
        main.write_text(f"{setting.name}: {beyond}\n")
        with pytest.raises(ConfigError, match=f"'{setting.name}'.*{limit}"):
            load_settings(home, main)


@pytest.mark.parametrize(
    "modules", ["appliance.service.history", "appliance.service.protection, appliance.capture.epoch"]
)
def test_a_verb_begins_without_what_it_does_not_need(modules):
    """A8: together these took half of the time in which a verb begins."""
    code = (
        f"import sys, pathlib, appliance.cli.app, {modules}\n"
        "from appliance.config import Home, load_settings\n"
        "load_settings(Home(pathlib.Path('/nowhere')), pathlib.Path('/nowhere/rewind.yaml'))\n"
        "unwanted = {'pydantic', 'yaml', 'crc32c', 'appliance.cli.records.image', 'appliance.service.image'}\n"
        "print(*unwanted & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_only_run_can_be_passed_through_by_others(tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.path.iterdir()}
    assert modes.pop("run") == 0o711
    assert set(modes.values()) == {0o700}


def test_a_home_that_was_not_made_says_what_makes_one(tmp_path):
    with pytest.raises(ConfigError) as caught:
        Home(tmp_path).instance()
    assert "rewind init" in caught.value.hint


def test_an_unreadable_instance_is_named(tmp_path):
    (tmp_path / "instance.json").write_text("{")
    with pytest.raises(ConfigError, match=r"instance\.json"):
        Home(tmp_path).instance()


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": 2}, mode=0o640)
    assert json.loads(path.read_text()) == {"b": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["value.json"]


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]
