"""`rewind image start`, up to the image that it builds. With libvirt: tests/integration/test_image_settle.py."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from appliance.config import Home
from appliance.service.image import making, starting
from images.settle.choice import After
from tests.support.settling import plan


class Enough(Exception):
    """The image that was to be built is known."""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The kernel's command line of the image for a domain of that name."""
    found = []

    def build_image(plan, *_args, **_rest):
        found.append(plan.command_line)
        raise Enough

    planned = making.Planned(plan(), "web", "p", None, "t", "fast")
    ready = making.Ready(planned, SimpleNamespace(tree=None, volumes=()), None, None)
    target = SimpleNamespace(definition="<domain><devices/></domain>", inventory=plan().inventory)
    monkeypatch.setattr(making, "prepared", lambda *_: contextlib.nullcontext(ready))
    monkeypatch.setattr(making, "build_image", build_image)
    monkeypatch.setattr(making.drivers, "reader", lambda *_: None)
    monkeypatch.setattr(starting.targets, "find", lambda *_: target)
    monkeypatch.setattr(starting, "resolve", lambda *_: SimpleNamespace(id="p"))
    monkeypatch.setattr(starting, "choose", lambda *_: [])
    monkeypatch.setattr(starting, "wanted_disks", lambda *_: [])
    nobody = SimpleNamespace(domains=list)
    session = SimpleNamespace(
        home=Home(tmp_path / "home"), uri="test:///", hypervisor=lambda: nobody,
        repository=SimpleNamespace(session=lambda _: contextlib.nullcontext()),
    )  # fmt: skip

    def start(name, **after):
        with pytest.raises(Enough):
            starting.start(session, "web", "latest", "rack", name, tmp_path / "files", after=After(**after))
        return found[-1]

    return start


@pytest.mark.parametrize("keep", [(), ("host-name",)])
def test_each_domain_gets_an_identity_of_its_own(made, keep):
    """P6-24: clones of one point on one target, also where its host name is kept, or cannot be that of the domain."""
    lines = {made(name, identity="new", keep=keep) for name in ("one", "two_clones", "three_clones")}
    assert len(lines) == 3 and all("systemd.machine_id=" in line for line in lines)
