"""A point is proven by booting it where it can harm nobody: what such a boot is made of, and what it shows.

    machine    a target's inventory as words for QEMU: the machine that stands for it
    report     what an image lays into /run, so that the system tells of itself on a serial port of its own
    manifest   what must be equal: of the point as it lies there, and of the system that tells
    judge      console, report and manifest become a verdict

Nothing here starts a process: appliance/restore/rehearsal.py does.
"""
