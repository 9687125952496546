"""What an admin should know before the build: sentences, each about one thing that may not work on the target."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from images.drivers.needs import keys_in_initrd, mode_of, sealed_keys
from images.drivers.settle import consoles, disk_names, found_on_disks, unstable_name
from images.drivers.tables import Module
from images.model import Client, Firmware, Inventory, Layer, Mount

__all__ = ["advice", "signed_loaders"]

_LATER = ("noauto", "nofail")
_OUTSIDE = ("updates/", "extra/", "weak-updates/")


def advice(
    client: Client,
    inventory: Inventory,
    load: Sequence[Module],
    identifiers: Collection[str] | None,
) -> tuple[str, ...]:
    """`load` are the modules that go in; `identifiers` are the `UUID=…` and other names found on the restored disks,
    None when nobody has looked."""
    return (
        *_secure_boot(client, inventory, load),
        *_keys(client, inventory),
        *_disks(client, inventory),
        *(word for mount in client.fstab for word in _mount(mount, inventory, identifiers)),
        *_consoles(client, inventory),
        *_firmware(client, inventory),
    )


def _secure_boot(client: Client, inventory: Inventory, load: Sequence[Module]) -> Iterator[str]:
    if not inventory.secure_boot:
        return
    loaders = signed_loaders(client)
    if not client.signed_kernel:
        yield f"Secure Boot is on, and kernel {client.release} is not signed: no image is built"
    for what, path in (("shim", client.shim), ("GRUB", client.grub)):
        if not loaders and not path:
            yield f"Secure Boot is on, and the guest has no signed {what}: no image is built"
    if loaders and client.signed_kernel:
        yield f"Secure Boot is on: the image starts the guest's signed kernel by shim and GRUB of the {loaders}"
    for module in load:
        if module.signed is False:
            yield f"Secure Boot is on, and module {module.name} from {module.origin} is unsigned: the kernel refuses it"
        elif module.signed is None and module.path.startswith(_OUTSIDE):
            yield f"Secure Boot is on, and module {module.path} loads only if the target trusts the key that signed it"


def signed_loaders(client: Client) -> Literal["guest", "template", ""]:
    """Whose shim and GRUB an image for Secure Boot has, empty where there are none that start its kernel: a shim
    starts only what its own vendor has signed, and the template's are Debian's."""
    if client.shim and client.grub:
        return "guest"
    return "template" if client.os_id == "debian" else ""


def _keys(client: Client, inventory: Inventory) -> Iterator[str]:
    for word in sealed_keys(client):
        if word == "tpm2-device":
            where = "the target has another TPM" if inventory.tpm else "the target has no TPM"
            yield f"crypttab seals a key to the TPM of the old machine, and {where}: another key is needed"
        else:
            yield f"crypttab gets a key by {word}: it must be in reach of the target"
    for path in keys_in_initrd(client) if mode_of(client)[0] == "append" else ():
        yield f"the guest's own initrd would be in the image, and may hold the key {path}: such an image is not built"
    if Layer.LUKS in client.root.layers and not sealed_keys(client):
        yield "the root is encrypted: its passphrase is asked for on the console of the target"


def _disks(client: Client, inventory: Inventory) -> Iterator[str]:
    """Names are no help here: the target's own may differ from those in the point."""
    carried = {name for device in inventory.devices for name in device.carries}
    if carried and len(carried) < len(client.root.disks):
        disks = " and ".join(client.root.disks)
        yield f"the root lies on {disks}, and the target has a place for {' and '.join(sorted(carried))} only"


def _mount(mount: Mount, inventory: Inventory, identifiers: Collection[str] | None) -> Iterator[str]:
    what = "uses swap on" if mount.fs == "swap" else f"mounts {mount.where} from"
    then = _then(mount)
    family, disk = unstable_name(mount.spec)
    names, carried = disk_names(inventory), {one for device in inventory.devices for one in device.carries}
    if family and family not in names:
        now = f"disks of this target are named {' and '.join(sorted(names))}…" if names else "the name may change"
        yield f"fstab {what} {mount.spec}, and {now}: {then}"
    elif family and carried and disk not in carried and any(one.startswith(family) for one in carried):
        yield f"fstab {what} {mount.spec}, which is not among the restored disks: {then}"
    elif not found_on_disks(mount.spec, identifiers):
        yield f"fstab {what} {mount.spec}, which is on none of the restored disks: {then}"


def _then(mount: Mount) -> str:
    if mount.where == "/":
        return "the root is found by another name, but it may not be remounted"
    if set(mount.options) & set(_LATER):
        return "the system starts without it"
    return "the system waits for it, then goes on" if mount.fs == "swap" else "the system stops there (no nofail)"


def _consoles(client: Client, inventory: Inventory) -> Iterator[str]:
    for name in dict.fromkeys(consoles(client.command_line)):
        if not name.startswith("tty0") and name != "tty1" and name != inventory.console:
            has = inventory.console or "no serial line"
            yield f"the command line has console={name}, and of the target {has} is known"


def _firmware(client: Client, inventory: Inventory) -> Iterator[str]:
    if client.firmware is inventory.firmware:
        return
    ways = {Firmware.BIOS: "BIOS", Firmware.UEFI: "UEFI"}
    here, there = ways[client.firmware], ways[inventory.firmware]
    yield f"the disk is set up for {here} and the target has {there}: it starts from the image until it is settled"
