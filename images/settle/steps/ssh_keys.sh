#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The old keys go only when the new ones are there. No copy of them is kept: they are somebody else's now.
keys=$(find /etc/ssh -maxdepth 1 -type f -name 'ssh_host_*_key' 2>/dev/null)
[ -n "$keys" ] || nothing "there are no host keys"
has ssh-keygen || fail "there is no ssh-keygen to make new keys"
new=$RW_HERE/keys
rm -rf "$new" && mkdir -p "$new/etc/ssh" && chmod 700 "$new" || fail "no room for new keys"
try ssh-keygen -A -f "$new" || fail "no new keys could be made"
for key in $keys; do
    kind=${key##*/}
    if [ ! -s "$new/etc/ssh/$kind" ]; then
        rm -f "$key" "$key.pub" "$key-cert.pub" # of a kind that is made no more
        continue
    fi
    for part in "$kind" "$kind.pub"; do
        cp "$new/etc/ssh/$part" "/etc/ssh/$part.rewind-new" && sync "/etc/ssh/$part.rewind-new" &&
            mv "/etc/ssh/$part.rewind-new" "/etc/ssh/$part" || fail "$part cannot be written"
    done
    rm -f "$key-cert.pub" # signed for the old key
    say "$kind is another one"
done
rm -rf "$new"
