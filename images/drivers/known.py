"""Names of drivers that distributions like to build into their kernels, by the devices that they are for.

A kernel's tables have no aliases of what is built in (they will, from about 6.18 on). The template's kernel names such
a driver where it has it as a module; but Debian 13 has virtio_pci built into all its kernels, the template's too. This
list only gives a name: whether the client's kernel has it, its own list of built-in drivers says.

Source: the drivers' tables of device ids in the kernel (MODULE_DEVICE_TABLE).
"""

from __future__ import annotations

from images.drivers.glob import Budget, Index

__all__ = ["known_names"]

_DRIVERS = {
    "virtio_pci": ["pci:v00001AF4d*sv*sd*bc*sc*i*"],
    "virtio_net": ["virtio:d00000001v*"],
    "virtio_blk": ["virtio:d00000002v*"],
    "virtio_console": ["virtio:d00000003v*"],
    "virtio_scsi": ["virtio:d00000008v*"],
    "nvme": ["pci:v*d*sv*sd*bc01sc08i02*", "pci:v00001D0Fd00000061sv*", "pci:v00001D0Fd00008061sv*"],
    "ahci": ["pci:v*d*sv*sd*bc01sc06i01*", "pci:v00008086d00002822sv*", "pci:v00008086d0000282Asv*"],
    "ata_piix": [f"pci:v00008086d0000{device}sv*sd*bc*sc*i*" for device in ("7010", "7111", "2920", "2921", "2926")],
    "vmd": [f"pci:v00008086d0000{device}sv*sd*bc*sc*i*" for device in ("201D", "28C0", "467F", "9A0B", "A77F")],
    "sd_mod": ["scsi:t-0x00*", "scsi:t-0x07*", "scsi:t-0x0e*", "scsi:t-0x14*"],
    "sr_mod": ["scsi:t-0x04*", "scsi:t-0x05*"],
    "mmc_block": ["mmc:block"],
    "sdhci_pci": ["pci:v*d*sv*sd*bc08sc05i00*", "pci:v*d*sv*sd*bc08sc05i01*"],
    "xhci_pci": ["pci:v*d*sv*sd*bc0Csc03i30*"],
    "ehci_pci": ["pci:v*d*sv*sd*bc0Csc03i20*"],
    "ohci_pci": ["pci:v*d*sv*sd*bc0Csc03i10*"],
    "uhci_hcd": ["pci:v*d*sv*sd*bc0Csc03i00*"],
    "usb_storage": ["usb:v*p*d*dc*dsc*dp*ic08isc06ip50in*"],
    "uas": ["usb:v*p*d*dc*dsc*dp*ic08isc06ip62in*"],
    "usbhid": ["usb:v*p*d*dc*dsc*dp*ic03isc*ip*in*"],
    "mptspi": ["pci:v00001000d00000030sv*sd*bc*sc*i*"],
    "mptsas": ["pci:v00001000d00000054sv*sd*bc*sc*i*"],
    "vmw_pvscsi": ["pci:v000015ADd000007C0sv*sd*bc*sc*i*"],
    "vmxnet3": ["pci:v000015ADd000007B0sv*sd*bc*sc*i*"],
    "e1000": ["pci:v00008086d0000100Esv*sd*bc*sc*i*", "pci:v00008086d0000100Fsv*sd*bc*sc*i*"],
    "e1000e": ["pci:v00008086d000010D3sv*sd*bc*sc*i*"],
    "ena": ["pci:v00001D0Fd0000EC20sv*sd*bc*sc*i*", "pci:v00001D0Fd0000EC21sv*sd*bc*sc*i*"],
    "gve": ["pci:v00001AE0d00000042sv*sd*bc*sc*i*"],
    "hv_vmbus": ["acpi*:VMBUS:*", "acpi*:VMBus:*"],
    "hv_storvsc": [
        f"vmbus:{guid}" for guid in
        ("d96361baa104294db60572e2ffb1dc7f", "32264132cb86a2449b5c50d1417354f5", "4acc9b2f6900f34ab76b6fd0be528cda")
    ],
    "hv_netvsc": ["vmbus:635161f83edfc546913ff2d2f965ed0e"],
    "xen_blkfront": ["xen:vbd"],
    "xen_netfront": ["xen:vif"],
}  # fmt: skip

_INDEX = Index(((pattern, name) for name, patterns in _DRIVERS.items() for pattern in patterns), "the known drivers")


def known_names(alias: str, budget: Budget) -> tuple[str, ...]:
    """Drivers that the alias is usually for. Raises GuestUnreadable when the budget is used up."""
    return _INDEX.match(alias, budget)
