"""Two homes protect one bare QEMU: only one of them is in its block graph at a time."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from appliance.capture import epoch, protection
from appliance.errors import Locked, RevertUnderWay
from appliance.hypervisor import connect, hostlock
from appliance.service import protection as verbs
from appliance.service.session import Session
from appliance.service.setup import init
from tests.support.revert_bench import Bench


@pytest.fixture
def two():
    """(bench, session of its home, session of another home): the other one knows the guest by another UUID, through
    its other monitor."""
    b = Bench()
    init(Session(b.home))
    b.start()
    other = Session(type(b.home)(b.folder / "other"))
    init(other)
    b.machine.monitor.close()
    uri = b.uri.replace(str(b.machine.other_socket), str(b.machine.socket)).replace("000000000001", "000000000002")
    domain = connect(uri).domain("bare")
    protection.save(other.home, replace(protection.new(other.repository, domain, ()), quiesce="never"))
    domain.close()
    b.hypervisor.close()
    first = Session(b.home)
    yield b, first, other
    first.close()
    other.close()
    b.close()


def test_the_second_home_is_refused_by_name(two):
    """P5-03: its `cont` inside the other's pause could kill the guest."""
    b, first, other = two
    with first.claim(first.domain("bare"), "point bare"), pytest.raises(Locked) as caught:
        verbs.point(other, "bare")
    assert f"home {b.home.path}" in caught.value.message
    assert verbs.point(other, "bare").disks


def test_two_homes_take_turns(two, monkeypatch):
    """P5-03: with --wait both get all their points, and no two epochs are in the graph together."""
    b, first, other = two
    protection.save(b.home, protection.new(first.repository, first.domain("bare"), ()))
    inside, most, real = [0], [0], epoch.take

    def counted(*args, **options):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return real(*args, **options)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(epoch, "take", counted)
    failed = []

    def points(home):
        try:
            with Session(home) as mine:
                for _ in range(3):
                    verbs.point(mine, "bare", quiesce="never", wait=30)
        except Exception as error:
            failed.append(error)

    first.close(), other.close()
    threads = [threading.Thread(target=points, args=(one.home,)) for one in (first, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == [] and most == [1]


def test_a_revert_keeps_other_homes_away(two):
    """P5-03: as long as it has not ended, also between two processes that drive it."""
    _, _, other = two
    names = hostlock.of_domain(other.domain("bare"))
    monitor = other.domain("bare").monitor()
    monitor.execute("blockdev-add", driver="null-co", node_name="rw-rvx-vda", size=1 << 20)
    try:
        with pytest.raises(RevertUnderWay, match="under way"):
            verbs.point(other, "bare", quiesce="never")
    finally:
        monitor.execute("blockdev-del", node_name="rw-rvx-vda")
    assert any(name.startswith("image-") for name in names)
