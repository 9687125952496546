"""A database under load and continuous capture: opened at any instant it holds what its clients were told, and no more.

    guest ── clients ── PostgreSQL ── tap ──► journal ──► point of an instant ──► mounted, recovered, asked

The guest is not booted for each instant: what a point serves is mounted as a disk, which replays the file system's
journal, and the guest's own PostgreSQL is started on it, which recovers as after a power cut.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from appliance.service.elsewhere import export
from tests.support import libvirt
from tests.support.bank import Bank, opened
from tests.support.debian import DebianGuest
from tests.support.tapped import Tapped

_INSTANTS = int(os.environ.get("REWIND_INSTANTS", "50"))
_SECONDS = float(os.environ.get("REWIND_SECONDS", "90"))
_CLIENTS = 4


def recorded(tapped, bank):
    """Load while every write is recorded, with a point amid; (first, last) of the seconds that can be asked for."""
    tapped.protect()
    began = max(time.time(), tapped.spans()[-1].since.timestamp())
    time.sleep(_SECONDS / 2)
    tapped.point()
    time.sleep(_SECONDS / 2)
    ended = time.time()
    bank.end()
    tapped.until(lambda: tapped.spans()[-1].end.timestamp() > ended, "it is not confirmed")
    return began, ended


def asked(dice, tapped, began, ended):
    """Instants in any order: half by their time, half by the number of a write."""
    span = tapped.spans()[-1]
    for number in range(_INSTANTS):
        if number % 2:
            yield f"#{dice.randint(span.bases[0].sequence + 1, span.last)}", None
        else:
            second = dice.uniform(began, ended)
            yield datetime.fromtimestamp(second, UTC).isoformat(), second


def held(tapped, bank, when, second, folder):
    """The books at that instant, held against what the clients were told; how long it took."""
    begun = time.monotonic()
    point = tapped.at(when)
    made = time.monotonic() - begun
    second = point.time.timestamp() if second is None else second
    socket = folder / "sock"
    with tapped.session() as session, export(session, tapped.guest.name, point.id, [], True, socket):
        books = opened(socket, folder)
    must, may = bank.must(second), bank.may(second)
    there = {client: books.clients.get(client, (0, 0))[1] for client in must}
    told = f"{when} = {point.id}: acknowledged {must}, allowed {may}, found {books}"
    assert books.whole, told
    assert books.recovered, told
    assert all(must[client] <= there[client] <= may[client] for client in must), told
    # Nothing but the one transaction of a client that was under way is open.
    assert all(may[client] - must[client] <= 1 for client in must), told
    return sum(there.values()), sum(there.values()) - sum(must.values()), made, time.monotonic() - begun


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_database_at_any_instant(libvirt_images):
    """P5-02, P5-23: every acknowledged transaction, none by half, none that was not begun."""
    dice = random.Random(int(os.environ.get("REWIND_SEED", "4")))
    with DebianGuest(libvirt_images, name="bank") as guest, tempfile.TemporaryDirectory(prefix="rw-") as name:
        guest.boot()
        with Bank(guest, _CLIENTS) as bank, Tapped(guest) as tapped:
            began, ended = recorded(tapped, bank)
            total = bank.acknowledged
            libvirt.virsh("destroy", guest.name)
            found = [
                held(tapped, bank, when, second, Path(name)) for when, second in asked(dice, tapped, began, ended)
            ]
    counts, ahead, made, whole = zip(*found, strict=True)
    assert max(counts) > min(counts) + 10, "hardly anything was written"
    print(
        f"{len(found)} instants of {ended - began:.0f} s and {total} transactions: each whole; {min(counts)} to "
        f"{max(counts)} transactions in them, {sum(ahead)} of {len(found) * _CLIENTS} under way were in already; "
        f"made in {statistics.median(made):.2f} s (longest {max(made):.2f}), open in {statistics.median(whole):.1f} s"
    )
