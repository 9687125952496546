"""A live guest of either driver, booted, and its domain protected: where most tests of real guests begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.protect import Protected
from tests.support.tiny import BareGuest, LibvirtGuest

__all__ = ["beginning"]


@contextmanager
def beginning(request, tmp_path, name, closing: Callable = lambda _world: None) -> Iterator[Callable]:
    """begin(*disks, settings=None, **options) -> (guest, world), under the driver that `request.param` names.

    Each disk is a function that gets the folder and gives a TinyDisk. Everything ends with the context, worlds after
    `closing` was told of them.
    """
    opened = []

    def begin(*disks, settings=None, **options):
        options = {"span": 1 << 20, **options}
        if request.param == "libvirt":
            request.getfixturevalue("libvirt_uri")
            folder = request.getfixturevalue("libvirt_images")
            guest = LibvirtGuest(folder, [make(folder) for make in disks], name=name, **options)
        else:
            guest = BareGuest(tmp_path, [make(tmp_path) for make in disks], name=name, **options)
        opened.append(guest)
        guest.boot()
        uri = guest.uri
        if request.param == "qmp":
            told = zip(guest.targets, guest.disks, strict=True)
            uri += "".join(f"&disk={target}:{disk.format}:{disk.path}" for target, disk in told)
        world = Protected(tmp_path, uri, guest.name, **(settings or {}))
        opened.append(world)
        return guest, world

    try:
        yield begin
    finally:
        for one in reversed(opened):
            if isinstance(one, Protected):
                closing(one)
            one.__exit__(None, None, None)
