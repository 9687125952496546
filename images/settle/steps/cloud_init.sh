#!/bin/sh
# cloud-init compares the id of its instance at each start. On hardware where the old source of it is gone, or another
# one answers, it would make new host keys, give the host another name, and write the network's configuration. Its own
# settings say that nobody but the owner changes the instance. The file sorts last, so it wins; removed, all is as before.
[ -d /etc/cloud/cloud.cfg.d ] || nothing "there is no cloud-init"
file=/etc/cloud/cloud.cfg.d/99_zz_rewind.cfg
cat >"$RW_HERE/cloud" <<'EOF'
# Written by Rewind when this system came to other hardware. Without this file cloud-init may take it for a new machine.
manual_cache_clean: true
preserve_hostname: true
manage_etc_hosts: false
ssh_deletekeys: false
network: {config: disabled}
EOF
if [ -e "$file" ] && cmp -s "$RW_HERE/cloud" "$file"; then nothing "$file is there already"; fi
replace "$file" <"$RW_HERE/cloud" || fail "$file cannot be written"
if [ -d /var/lib/cloud/instance/ ]; then
    # The mark by which it knows in its first stage that the instance it has is the right one.
    : >/var/lib/cloud/instance/manual-clean || fail "/var/lib/cloud/instance cannot be written"
fi
say "it leaves host name, keys and network alone: $file"
