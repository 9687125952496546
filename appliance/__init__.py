"""Rewind: time-indexed recovery points of libvirt and QEMU guests, and reverts that move only what differs.

`ARCHITECTURE.md` draws the whole; the way of a block is capture, store, timeline, restore.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
