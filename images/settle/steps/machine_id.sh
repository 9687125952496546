#!/bin/sh
# systemd has RW_ID from the command line already and shows it in the place of /etc/machine-id; it has to stay on the
# disk, also for D-Bus where that has a copy of its own.
if findmnt -n /etc/machine-id >/dev/null 2>&1; then
    umount /etc/machine-id || fail "the old id cannot be reached"
fi
[ "$(cat /etc/machine-id 2>/dev/null)" != "$RW_ID" ] || nothing "it is $RW_ID already"
if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
    printf '%s\n' "$RW_ID" | replace /var/lib/dbus/machine-id || fail "/var/lib/dbus/machine-id cannot be written"
fi
printf '%s\n' "$RW_ID" | replace /etc/machine-id || fail "/etc/machine-id cannot be written"
say "the id is $RW_ID"
