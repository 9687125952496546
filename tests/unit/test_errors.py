"""Every error has its sentence, its hint and its code, and survives the way through a child process."""

from __future__ import annotations

import pickle

import pytest

from appliance import errors
from appliance.errors import RewindError, exit_codes

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
