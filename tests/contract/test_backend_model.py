"""Random calls with random faults against a model: what was acknowledged holds, and nothing else is made up."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import AlreadyExists, NoSpace, ObjectNotFound, Temporary
from appliance.store.backend.faulty import Fault, Faulty
from appliance.store.backend.local import LocalBackend
from appliance.store.backend.memory import MemoryBackend
from appliance.store.backend.wrap import Retrying

NAMES = ("config", "packs/" + "0f" * 16, "packs/" + "0e" * 16, "points/1", "points/2")
FAULTS = (None, None, None, Fault.REFUSE, Fault.LOSE, Fault.REPEAT, Fault.NO_SPACE)
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "delete", "list", "stat"]), st.sampled_from(NAMES)), max_size=30
)
numbers = itertools.count()


def run(inner, steps, faults) -> None:
    """`possible[name]` is the set of contents that may be there, None for none."""
    upcoming = iter(faults)
    backend = Retrying(Faulty(inner, lambda _: next(upcoming, None)), attempts=3, sleep=lambda _: None)
    possible: dict[str, set[bytes | None]] = {name: {None} for name in NAMES}
    for number, (kind, name) in enumerate(steps):
        content = b"%d" % number * 50
        there = possible[name]
        try:
            if kind == "put":
                backend.put(name, content)
                assert None in there, "an object was overwritten"
                possible[name] = {content}
            elif kind == "delete":
                backend.delete(name)
                possible[name] = {None}
            elif kind == "get":
                seen = backend.get(name, 1, 30)
                possible[name] = {one for one in there if one is not None and one[1:31] == seen}
                assert possible[name]
            elif kind == "stat":
                size = backend.stat(name).size
                possible[name] = {one for one in there if one is not None and len(one) == size}
                assert possible[name]
            else:
                listed = {info.name: info.size for info in backend.list()}
                for one, contents in possible.items():
                    assert listed.get(one) in {None if content is None else len(content) for content in contents}
        except AlreadyExists:
            possible[name] = there - {None}
            assert possible[name], "nothing was there"
        except ObjectNotFound:
            assert None in there, "an object was lost"
            possible[name] = {None}
        except (Temporary, NoSpace):
            if kind == "put" and None in there:
                possible[name] = there | {content}  # also NoSpace: an earlier try may have taken effect
            elif kind == "delete":
                possible[name] = there | {None}
    final = {info.name: inner.get(info.name) for info in inner.list()}
    for name, contents in possible.items():
        assert final.get(name) in contents


@given(STEPS, st.lists(st.sampled_from(FAULTS), max_size=60))
@settings(max_examples=300, deadline=None)
def test_memory_behind_faults(steps, faults):
    """A9: lost, repeated and refused calls."""
    run(MemoryBackend(f"model-{next(numbers)}"), steps, faults)


@given(STEPS, st.lists(st.sampled_from(FAULTS), max_size=60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_folder_behind_faults(steps, faults):
    with tempfile.TemporaryDirectory() as folder:
        run(LocalBackend(Path(folder) / "store"), steps, faults)
