"""Addresses that are not those of the machine in the point: they are asked for by DHCP."""

from __future__ import annotations

from images.settle.step import Step

__all__ = ["STEP"]

STEP = Step(
    name="addresses", phase="identity", order=40,
    description=(
        "network cards ask for their addresses by DHCP and have their own hardware's (ifupdown, networkd, netplan, "
        "NetworkManager); old leases go"
    ),
)  # fmt: skip
