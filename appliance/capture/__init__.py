"""Capture: how what a guest writes becomes a recovery point.

    epoch     one point by dirty bitmaps and copy-before-write, pushed by QEMU itself
    intake    the NBD server that an epoch is pushed into
    ingest    what it does with the bytes: chunks into the repository, a list of changes for the map
    changes   that list: one file for each disk, which outlives the server
    ship      sealed segments of a journal to the repository and back
    salvage   the newest instant that the repository alone can prove, when the host is lost
    heal      back to full protection when a bitmap is gone or cannot be trusted

Modules are imported by name, so that a command line that captures nothing does not pay for them.
"""

__all__: list[str] = []
