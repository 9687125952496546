"""The segment behind the client's own initrd: drivers for this target, settings for /run.

Nothing of the client's initrd is replaced, and nobody has to know how it was made: what is ours lies below /rw, and two
generators are told of it by files that they look for anyway.

    initramfs-tools   conf/conf.d/rewind is sourced before udev starts: inserts the drivers; scripts/rewind is the boot
                      script it names, sourced when /run is there: lays the settings
    systemd (dracut)  rewind-load.service before devices are looked for; a drop-in of initrd-cleanup.service, the last
                      step before the root is switched to

Modules are inserted by our busybox in the plan's order and not by the client's modprobe: a driver out of the store is
in none of the client's tables. Behind and not before, because an initrd may begin with an unpacked archive of microcode
that the kernel looks for at its very start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from images.model import Plan
from images.template.modules import plain_name
from images.template.newc import Archive
from images.template.settings import Settings

__all__ = ["segment"]

_LOAD = """#!/rw/bin/busybox sh
# Inserts the drivers of this machine. One that is there already, or that finds nothing to do, is no failure.
while read -r module; do
    words=$(/rw/bin/busybox insmod "/rw/kernel/$module" 2>&1) || echo "rewind: module $module: $words" >/dev/kmsg
done </rw/modules
echo "rewind: drivers loaded: $(/rw/bin/busybox wc -l </rw/modules)" >/dev/kmsg
"""
_LAY = "/rw/bin/busybox cp -a /rw/root/. /run/"
_CONF = "BOOT=rewind\n/rw/bin/busybox sh /rw/load\n"
_BOOT = f"# The scripts of the usual boot are sourced already.\n{_LAY}\n"
_LOAD_UNIT = """[Unit]
Description=Drivers for this machine
DefaultDependencies=no
Before=systemd-udev-trigger.service systemd-modules-load.service sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/rw/bin/busybox sh /rw/load
"""
_LAY_DROP_IN = f"[Service]\nExecStartPre=-{_LAY}\n"


def segment(
    template_busybox: Path,
    plan: Plan,
    plains: Mapping[str, bytes],
    settings: Settings,
    firmware: Mapping[str, bytes],
) -> bytes:
    """The archive, not packed. `plains`: the plan's modules, unpacked."""
    archive = Archive()
    archive.file("rw/bin/busybox", template_busybox.read_bytes(), 0o755)
    archive.file("rw/load", _LOAD.encode(), 0o755)
    archive.file("rw/modules", "".join(f"{plain_name(path)}\n" for path in plan.load).encode())
    archive.folder("rw/root")
    for path, data in plains.items():
        archive.file(f"rw/kernel/{plain_name(path)}", data)
    for name, data in firmware.items():
        archive.file(f"usr/lib/firmware/{name}", data)
    for name, data in settings.run.items():
        archive.file(f"rw/root/{name}", data)
        if name.startswith("systemd/network/"):
            archive.file(f"etc/{name}", data)  # for the udev of the initrd itself
    for name, data in settings.extra.items():
        archive.file(name, data, 0o755)
    _tell_initramfs_tools(archive)
    _tell_systemd(archive)
    return archive.finish()


def _tell_initramfs_tools(archive: Archive) -> None:
    archive.file("conf/conf.d/rewind", _CONF.encode())
    archive.file("scripts/rewind", _BOOT.encode(), 0o755)


def _tell_systemd(archive: Archive) -> None:
    units = "etc/systemd/system"
    archive.file(f"{units}/rewind-load.service", _LOAD_UNIT.encode())
    archive.link(f"{units}/sysinit.target.wants/rewind-load.service", "../rewind-load.service")
    archive.file(f"{units}/initrd-cleanup.service.d/rewind.conf", _LAY_DROP_IN.encode())
