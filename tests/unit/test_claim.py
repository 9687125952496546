"""Who is served when more than one machine starts from the same image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from appliance.restore import claim
from appliance.restore.claim import Answer, Asked, Claims
from images.stream.layout import Layout
from images.stream.settings import Stream

ONE, TWO, THREE = "1" * 16, "2" * 16, "3" * 16


class Clock:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "claim"


def ask(path, boot, machine="rack.1"):
    """As keeper.sh does it."""
    with path.open("r+b") as file:
        file.write(f"rewind 1\nboot {boot}\nmachine {machine}\nend\n".encode().ljust(4096, b"\0"))


def served(path, clock, boot=ONE):
    found = Claims(path, clock)
    ask(path, boot)
    found.tend()
    assert found.answer.granted == boot
    return found


def test_the_first_one_is_served(path, clock):
    """P6-14: at once, and by a server that is started anew as well."""
    claims = Claims(path, clock)
    claims.tend()
    assert claims.answer == Answer()
    ask(path, ONE)
    claims.tend()
    assert claims.answer == Answer(ONE, "rack.1") == Claims(path, clock).answer


def test_another_machine_is_refused_while_the_first_one_lives(path, clock):
    """P6-14: two machines that write to one root would mix what they write."""
    claims = served(path, clock)
    ask(path, TWO, "rack.2")
    claims.tend()
    clock.seconds += 44
    claims.tend()
    assert claims.answer == Answer(ONE, "rack.1")
    claims.heard()
    claims.tend()
    assert claims.answer == Answer(ONE, "rack.1", TWO, "another machine, rack.1, runs from this session")
    assert claim.read_answer(path) == claims.answer
    clock.seconds += 1000  # it is not let in later either, when it has been told already
    claims.tend()
    assert claims.answer.granted == ONE


@pytest.mark.parametrize(("machine", "seconds"), [("rack.1", 8), ("rack.2", 45)])
def test_one_that_has_lost_its_power_makes_room(machine, seconds, path, clock):
    """P6-14: the same machine is served again soon; another one has to wait for longer than a link needs to break."""
    claims = served(path, clock)
    ask(path, TWO, machine)
    claims.tend()
    clock.seconds += seconds - 1
    claims.tend()
    assert claims.answer.granted == ONE
    clock.seconds += 2
    claims.tend()
    assert claims.answer == Answer(TWO, machine)


def test_another_machine_waits_for_longer_than_a_link_needs_to_break():
    """The kernel's patience with a silent server, the time between two signs, and the one to connect again: a machine
    whose link breaks is heard of again before its place is given away."""
    kernel, signs, pause = Stream("rewind-1", "10.0.0.1", 1, Layout((), "")).timeout, 3, 1
    keeper = (Path(claim.__file__).parents[2] / "images/stream/keeper.sh").read_text()
    for name, seconds in (("give_signs()", signs), ("without_server()", pause)):
        assert f"sleep {seconds}\n" in keeper[keeper.index(name) :].partition("}\n")[0]
    lost = int(re.search(r"^CONNECT=(\d+)$", keeper, re.MULTILINE)[1])  # a try while the network is still away
    assert kernel + signs + pause + lost + pause < claim._OVER_OTHER - 3  # the one that succeeds takes a moment


@pytest.mark.parametrize("machine", ["rack.1", "rack.2"])
def test_silence_while_nobody_could_be_heard_is_none(machine, path, clock):
    """P6-14: a storage daemon that hung for minutes costs no machine its root; and is no sign of life of it either."""
    claims = served(path, clock)
    ask(path, TWO, machine)
    claims.tend()
    for _ in range(100):
        clock.seconds += 1
        claims.deaf()
        claims.tend()
    clock.seconds += 7
    claims.tend()
    assert claims.answer == Answer(ONE, "rack.1")
    clock.seconds += 60
    claims.tend()
    assert claims.answer == Answer(TWO, machine)


def test_a_new_server_knows_nothing_of_who_was_heard(path, clock):
    """It waits as if it had just heard of the machine that it serves."""
    served(path, clock)
    clock.seconds += 1000
    claims = Claims(path, clock)
    ask(path, TWO, "rack.2")
    claims.tend()
    assert claims.answer.granted == ONE
    claims.heard()
    clock.seconds += 1
    ask(path, THREE, "rack.3")
    claims.tend()
    assert claims.answer.granted == ONE and not claims.answer.refused  # nothing was heard since this one has asked
    clock.seconds += 1
    claims.heard()
    claims.tend()
    assert claims.answer.refused == THREE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rewind 1\nboot 1111111111111111\nmachine rack\n",
        "rewind 2\nboot 1111111111111111\nmachine rack\nend\n",
        "rewind 1\nboot ../../etc\nmachine rack\nend\n",
        "rewind 1\nboot 1111111111111111,name=x\nmachine rack\nend\n",
        "rewind 1\nboot 1111111111111111\nmachine a b\nend\n",
        "\xff" * 5000,
    ],
)
def test_what_is_no_question_is_not_answered(text, path, clock):
    """Its words become names of exports: what is not as it must be is nothing."""
    claim.create(path)
    with path.open("r+b") as file:
        file.write(text.encode()[:4096])
    claims = Claims(path, clock)
    claims.tend()
    assert claim.read_asked(path) == Asked() and claims.answer == Answer()


def test_an_answer_that_a_machine_has_written_over_grants_nobody(path, clock):
    served(path, clock)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"rewind 1\ngranted x,writable=on\nmachine y\nend\n".ljust(4096, b"\0"))
    assert Claims(path, clock).answer == Answer()
