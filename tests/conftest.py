"""Fixtures that every folder of tests may use. Guests and libvirt are started only by the tests that ask for them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support import libvirt, world
from tests.support.limits import PATIENCE


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported: `@settings` takes what it does not say from the profile of that moment. Without
    deadlines, because one of 200 ms judges the machine; the same examples each time where a failure would stop a
    commit, and new ones only in a soak."""
    soak = config.option.markexpr == "soak"
    hypothesis.settings.register_profile("rewind", deadline=None, derandomize=not soak)
    hypothesis.settings.load_profile("rewind")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stretch every time limit: they are written for a quiet machine."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit = float(marker.args[0] if marker and marker.args else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(limit * PATIENCE), append=False)


@pytest.fixture(autouse=True)
def _no_guards() -> Iterator[None]:
    """A guard stays for the next epoch of its domain, in this process: a hundred of them would be a gigabyte."""
    yield
    module = sys.modules.get("appliance.hypervisor.guard")
    if module is not None:
        with module._lock:
            left = list(module._guards.values())
            module._guards.clear()
        for guard in left:
            guard.close()


@pytest.fixture(scope="session")
def libvirt_uri() -> Iterator[str]:
    """A libvirt of our own that answers at this URI. Skips outside the private world: run through `./dev test`."""
    if not world.inside():
        pytest.skip("needs the private world of ./dev test")
    yield libvirt.start()


@pytest.fixture
def libvirt_images(libvirt_uri):
    """A new folder for disk images that libvirt's QEMU may read and write."""
    folder = world.images_folder("test")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
