"""The client's own initramfs, made by its own tool on the hardware that it is for."""

from __future__ import annotations

from images.settle.step import Step

__all__ = ["STEP"]

STEP = Step(
    name="initramfs", phase="settle", order=10,
    description="the guest's own tool (update-initramfs, dracut) makes its initramfs anew, with the disk's driver",
)  # fmt: skip
