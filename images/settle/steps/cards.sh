#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# RW_MACS: words OLD=NEW. Only where a file *finds* a card by its address: an address that a file gives to a card is
# something else, and a matter of identity. Before any of the programs reads its files, but netplan's generator: it runs
# again.
#
# What is the new address of one card may be the old one of another: a file that is exchanged twice is wrong. So each is
# exchanged from its original, which is kept once for this image, and a start that was cut off is gone on with.
[ -n "$RW_MACS" ] || nothing "no card is known by its address"
changed=
# Of some of these files `addresses`, which comes later, keeps what they were until netplan has taken them. Where a start
# was cut off in that, what it kept would be put back over what is exchanged here: so it is put back first.
first=$RW_STATE/before/addresses-$RW_IMAGE
originals_back || fail "netplan's files were to be as they were before their addresses, and are not: $first has them"
first=$RW_STATE/before/cards-$RW_IMAGE

# The files are as before, and their originals go: other steps may change them before this one is tried again.
back() {
    originals_back || fail "$1; the files were to be as before, and are not: $first has them"
    case $changed in *.yaml*) netplan_again ;; esac
    fail "$1; the files are as before"
}

# netplan: `macaddress` below `match`. networkd and udev: [Match] of a .network, .link or .netdev. NetworkManager:
# mac-address, which is not cloned-mac-address. ifcfg: HWADDR. udev's old rules: ATTR{address}==.
exchange() {
    awk -v pairs="$RW_MACS" -v kind="$2" '
        BEGIN { count = split(pairs, pair, " "); for (i = 1; i <= count; i++) { split(pair[i], one, "="); new[one[1]] = one[2] } }
        # From left to right, each place once: what is the new address of one card may be the old one of another.
        function swapped(line,  out, low, old, at, dashed, first, found) {
            for (;;) {
                low = tolower(line); first = 0
                for (old in new) {
                    dashed = old; gsub(/:/, "-", dashed)
                    at = index(low, old); if (!at) at = index(low, dashed)
                    if (at && (!first || at < first)) { first = at; found = old }
                }
                if (!first) return out line
                out = out substr(line, 1, first - 1) new[found]; line = substr(line, first + 17)
            }
        }
        kind == "netplan" {
            match($0, /^ */)
            if (inside && $0 ~ /[^ ]/ && RLENGTH <= deep) inside = 0
            if ($0 ~ /^ *match:/) { inside = 1; deep = RLENGTH; print swapped($0); next }
            print inside && $0 ~ /^ *macaddress:/ ? swapped($0) : $0
            next
        }
        kind == "sections" {
            if ($0 ~ /^[ \t]*\[/) section = $1
            print section == "[Match]" && $0 ~ /^[ \t]*(MACAddress|PermanentMACAddress)[ \t]*=/ ? swapped($0) : $0
            next
        }
        kind == "keyfile" { print $0 ~ /^mac-address=/ ? swapped($0) : $0; next }
        kind == "ifcfg" { print $0 ~ /^HWADDR=/ ? swapped($0) : $0; next }
        { print $0 ~ /ATTR\{address\}==/ ? swapped($0) : $0 }' "$1"
}

for file in /etc/netplan/*.yaml /etc/systemd/network/*.network /etc/systemd/network/*.link \
    /etc/NetworkManager/system-connections/* /etc/sysconfig/network-scripts/ifcfg-* \
    /etc/udev/rules.d/70-persistent-net.rules; do
    [ -f "$file" ] || continue
    case $file in
        *.yaml) kind=netplan ;;
        *.network | *.link) kind=sections ;;
        */ifcfg-*) kind=ifcfg ;;
        *.rules) kind=udev ;;
        *) kind=keyfile ;;
    esac
    from=$file
    [ ! -e "$first$file" ] || from=$first$file
    exchange "$from" "$kind" >"$RW_HERE/exchanged" || back "$file cannot be read"
    cmp -s "$from" "$RW_HERE/exchanged" && continue
    original "$file" || back "$file cannot be kept"
    if cmp -s "$file" "$first$file"; then
        replace "$file" <"$RW_HERE/exchanged" || back "$file cannot be written"
    elif ! cmp -s "$file" "$RW_HERE/exchanged"; then
        say "$file has changed since a start that was cut off, and stays"
        continue
    fi
    changed="$changed $file"
done
[ -n "$changed" ] || nothing "no file finds a card by its old address"
case $changed in *.yaml*) netplan_again || back "netplan does not take its files" ;; esac
say "these find the new cards:$changed"
