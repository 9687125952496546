"""Where domains run: libvirt or a bare QEMU behind one protocol. `connect` chooses the driver by URI.

`base` holds the protocol and its values, `graph` every block-graph change, once for all drivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.errors import NotSupported

if TYPE_CHECKING:
    from appliance.hypervisor.base import Hypervisor

__all__ = ["connect"]


def connect(uri: str) -> Hypervisor:
    """Open a hypervisor.

    `qemu:///system`, `qemu:///session`, `qemu:///embed?root=DIR` and `qemu+unix:///system?socket=…` are libvirt on this
    host; `qmp:///path/to/monitor.sock?name=NAME` is one QEMU with its own QMP socket. Raises ConnectError, or
    NotSupported for a URI that names another host: QEMU is our client through local sockets only.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "qmp":
        from appliance.hypervisor.bare import QmpHypervisor

        return QmpHypervisor(uri)
    if scheme.partition("+")[0] != "qemu" or (rest and not rest.startswith("/")) or "+ssh" in scheme:
        raise NotSupported(
            object=uri,
            reason="only libvirt's QEMU driver and QMP sockets on this host can be reached",
            hint="run rewind on the host of the guest, with qemu:///system",
        )
    from appliance.hypervisor.libvirt import LibvirtHypervisor

    return LibvirtHypervisor(uri)
