"""Restore: from a recovery point to something that runs or can be read.

    export       any point as NBD exports
    image        one disk of a point as a new image file or on a block device
    patch        the qcow2 that sends reads of differing blocks to a view
    revert       the running domain back to a point, by moving only what differs:
                 precopy ─► switching ─► drive, which has retrieval move it
    neighbours   what other homes of this host have half-way
    fence        nobody starts a domain whose disk is half-way
    result       how a revert ended, as it is told
    keeper       keeps a revert's view alive
    hydrations   domains that run from a view, each by a process (hydrate) until its disks are filled
    streams      machines that boot from a view over the network, each by a process (serve)
    rehearsal    a machine (stage) on throw-away layers over a view: a test boot

Modules are imported by name.
"""

__all__: list[str] = []
