"""Every error has its sentence, its hint and its code, and survives the way through a child process."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from appliance import errors
from appliance.cli.verbs.protection import _paused
from appliance.errors import (
    NoSpace,
    NoSuchPoint,
    PermissionDenied,
    RevertUnderWay,
    RewindError,
    exit_codes,
    of_the_system,
)

CLASSES = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
# Exit codes by family, as the module's docstring and `rewind help exit-codes` promise.
BANDS = {
    "HypervisorError": (10, 19), "CaptureError": (20, 29), "StoreError": (30, 39), "TimelineError": (40, 49),
    "RestoreError": (50, 59),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_has_its_own_code_in_its_band(kind):
    assert 2 <= kind.exit_code <= 130
    for family, (low, high) in BANDS.items():
        if issubclass(kind, getattr(errors, family)):
            assert low <= kind.exit_code <= high


@pytest.mark.parametrize("kind", CLASSES)
def test_a_sentence_is_lower_case_without_full_stop(kind):
    text = kind.template
    assert not text.endswith(".")
    first = text[0]
    assert first in "{'" or first.islower() or text.startswith("QEMU"), text


def test_codes_are_told_apart():
    """Only the family's own code is shared: 30 is also "there is no repository"."""
    seen = {}
    for code, name, _template in exit_codes():
        seen.setdefault(code, []).append(name)
    assert {code: names for code, names in seen.items() if len(names) > 1} == {
        30: ["repository-not-found", "store-error"]
    }


def test_the_drawing_of_the_tree_is_true():
    """The table at the top of errors.py is what a reader believes."""
    for kind in CLASSES:
        assert f"{kind.__name__} " in errors.__doc__, f"{kind.__name__} is missing in the docstring"
        line = next(line for line in errors.__doc__.splitlines() if line.split()[:1] == [kind.__name__])
        assert str(kind.exit_code) in line.split()[1:2], line


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickling(kind):
    error = kind(reason="the reason", domain="web", hint="do this")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.hint, copy.fields) == (error.message, "do this", error.fields)


def test_a_forgotten_field_does_not_hide_the_error():
    assert "?" in errors.DomainNotFound(domain="web").message


def test_ids_are_stable_kebab_case():
    assert errors.NoSuchPoint(domain="x", when="y").id == "no-such-point"
    assert RewindError(reason="x").id == "rewind-error"


@pytest.mark.parametrize("user", [0, 1000])
def test_a_file_system_that_nobody_may_write_to_is_no_matter_of_the_user(user, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    for name, said in (("/srv/home/x", "findmnt -T /srv/home"), (b"/srv/home/x", "findmnt -T /srv/home"),
                       (None, "findmnt -O ro"), (5, "findmnt -O ro")):  # fmt: skip
        told = of_the_system(OSError(errno.EROFS, "Read-only file system", name))
        assert isinstance(told, PermissionDenied) and said in told.hint, (name, told)
    told = of_the_system(PermissionError(errno.EACCES, "Permission denied", b"/srv/home/x"))
    assert told is not None and told.message.startswith("no permission at /srv/home for 'x'")
    assert ("as the owner" in told.hint) is (user != 0)


@pytest.mark.parametrize("name", [None, 5])
def test_what_is_refused_without_a_path_is_a_bug_and_keeps_its_trace(name):
    """It was told as "no permission at . for '?'"."""
    assert of_the_system(PermissionError(errno.EPERM, "Operation not permitted", name)) is None


def test_what_is_in_the_way_is_looked_at_itself(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(NotADirectoryError) as met:
            os.listdir(path)
        told = of_the_system(met.value)
        assert told is not None and told.hint == f"`stat {file}` tells what is there"


def test_a_command_in_a_hint_can_be_typed_whatever_the_name():
    """A12: libvirt allows spaces and quotes in names."""
    assert "`rewind resume 'le er-ü'` ends it" in RevertUnderWay(domain="le er-ü", point="p").hint
    assert RevertUnderWay(domain="web", point="p").hint == "`rewind resume web` ends it"
    assert NoSuchPoint(when="x").hint == "`rewind points ?` lists them"
    assert "`rewind pause 'le er-ü' --end`" in _paused("le er-ü", False, None)


def test_a_full_repository_is_told_a_way_that_helps_also_where_nothing_can_be_forgotten():
    assert "make it larger" in NoSpace(url="/mnt/repo", name="locks/shared.1").hint
