#!/bin/sh
# systemd has RW_ID from the command line already and shows it in the place of /etc/machine-id; it may have put it on the
# disk by itself. There it has to stay, also for D-Bus where that has a copy of its own, which comes first: as long as
# the other has the old id, a start that was cut off is done again.
if findmnt -n /etc/machine-id >/dev/null 2>&1; then
    umount /etc/machine-id || fail "the old id cannot be reached"
fi
changed=
for file in /var/lib/dbus/machine-id /etc/machine-id; do
    [ "$file" = /etc/machine-id ] || { [ -f "$file" ] && [ ! -L "$file" ]; } || continue
    [ "$(cat "$file" 2>/dev/null)" != "$RW_ID" ] || continue
    printf '%s\n' "$RW_ID" | replace "$file" || fail "$file cannot be written"
    changed=1
done
[ -n "$changed" ] || nothing "it is $RW_ID already"
say "the id is $RW_ID"
