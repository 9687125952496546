#!/bin/sh
# What every step may use. Sourced by `run`; the settings are read already.

# For people: on the console, in the report, and by the standard output in the journal.
say() {
    printf '%s: %s\n' "$RW_STEP" "$*" >>"$RW_REPORT"
    { printf 'rewind: %s: %s\n' "$RW_STEP" "$*" >/dev/console; } 2>/dev/null || :
    printf '%s: %s\n' "$RW_STEP" "$*"
}

nothing() { say "$*"; exit 3; }
leave() { say "$*"; exit 4; }
fail() { say "$*"; exit 1; }

# Runs a program; what it says goes to the journal by the standard output, its last line to the report when it fails.
try() {
    if "$@" >"$RW_HERE/said" 2>&1; then
        cat "$RW_HERE/said"
        return 0
    fi
    cat "$RW_HERE/said"
    say "$1: $(tail -n 1 "$RW_HERE/said")"
    return 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# A copy of a file before it is changed for the first time, in the client's own /var/lib/rewind/before: whole, and on the
# disk before the change is.
save() {
    saved=$RW_STATE/before$1
    [ -e "$1" ] && [ ! -e "$saved" ] || return 0
    mkdir -p "${saved%/*}" && cp -a "$1" "$saved.new" && sync "$saved.new" && mv "$saved.new" "$saved" && sync "$saved"
}

# Puts new content, the standard input, in the place of a file (of the one that a link leads to), in one moment and with
# the old one's owner and mode. What a power cut leaves has a name that no program reads beside the others.
replace() {
    place=$(readlink -f "$1") && save "$place" || return 1
    fresh=${place%/*}/.${place##*/}.rewind-new
    [ ! -e "$place" ] || cp -a "$place" "$fresh" || return 1
    cat >"$fresh" && sync "$fresh" && mv "$fresh" "$place"
}

# A copy of $1 below the folder `first` until the step has ended: whole, and on the disk before the file is changed. That
# of a start that was cut off stays.
# shellcheck disable=SC2154 # the step says where
original() {
    [ ! -e "$first$1" ] || return 0
    mkdir -p "$first${1%/*}" && cp -p "$1" "$first.new" && sync "$first.new" && mv "$first.new" "$first$1" &&
        sync "$first$1"
}

# The files are as before, and their originals go.
originals_back() {
    find "$first" -type f 2>/dev/null | while IFS= read -r old; do
        [ ! -f "${old#"$first"}" ] || replace "${old#"$first"}" <"$old" || exit 1
    done || return 1
    sync
    rm -rf "$first"
}

# The partition table of /dev/$1 as a file $2 that sfdisk takes back.
keep_table() { sfdisk -d "/dev/$1" >"$2.new" && sync "$2.new" && mv "$2.new" "$2" && sync "$2"; }

# The disks (sda nvme0n1) below what is mounted at $1, through all layers.
disks_below() {
    source=$(findmnt -nvo SOURCE --target "$1") || return 1
    lsblk -nrso NAME,TYPE "$source" | awk '$2 == "disk" && !seen[$1]++ { print $1 }'
}

# Sectors before the first partition of /dev/$1.
gap() {
    for start in "/sys/class/block/$1/$1"*/start; do
        [ ! -e "$start" ] || cat "$start"
    done | sort -n | head -n 1
}

# The EFI system partition of /dev/$1; empty if there is none.
esp() {
    lsblk -nrpo NAME,PARTTYPE "/dev/$1" |
        awk 'tolower($2) == "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" || tolower($2) == "0xef" { print $1; exit }'
}

has_bios_partition() { lsblk -nro PARTTYPE "/dev/$1" | grep -qi 21686148-6449-6e6f-744e-656564454649; }

# Kernel modules of the drivers from a disk (sda) up to its controller.
drivers_of() {
    path=$(readlink -f "/sys/class/block/$1/device") || return 1
    while [ "${path#/sys/devices/}" != "$path" ]; do
        if [ -e "$path/driver/module" ]; then
            module=$(readlink -f "$path/driver/module")
            echo "${module##*/}"
        fi
        path=${path%/*}
    done | sort -u
}

# --- the network's configuration ------------------------------------------------------------------------------------

# Files with fixed addresses, one a line. A name server's address is none.
fixed_addresses() {
    for file in /etc/network/interfaces /etc/network/interfaces.d/*; do
        [ -f "$file" ] && grep -Eq '^[[:space:]]*iface .*[[:space:]]static' "$file" && echo "$file"
    done
    for file in /etc/systemd/network/*.network; do
        [ -f "$file" ] && networkd_fixed "$file" && echo "$file"
    done
    for file in /etc/NetworkManager/system-connections/*; do
        [ -f "$file" ] && grep -Eq '^address(es)?[0-9]*=' "$file" && echo "$file"
    done
    for file in /etc/sysconfig/network-scripts/ifcfg-* /etc/sysconfig/network/ifcfg-*; do
        [ -f "$file" ] && grep -Eq '^IPADDR[0-9]*=' "$file" && echo "$file"
    done
    for file in /etc/netplan/*.yaml; do
        [ -f "$file" ] && netplan_fixed "$file" && echo "$file"
    done
    return 0
}

# Of netplan: `addresses` or a gateway that are not those of name servers.
netplan_fixed() {
    awk '
        { match($0, /^ */); deep = RLENGTH }
        /^ *(#.*)?$/ { next }
        inside && deep <= under { inside = 0 }
        /^ *nameservers:/ { inside = 1; under = deep; next }
        !inside && /(^|[ {,])(addresses|gateway4|gateway6):/ { found = 1 }
        END { exit !found }' "$1"
}

# Files that give a card another hardware address than its own.
given_macs() {
    for file in /etc/network/interfaces /etc/network/interfaces.d/*; do
        [ -f "$file" ] && grep -Eq '^[[:space:]]*hwaddress[[:space:]]' "$file" && echo "$file"
    done
    for file in /etc/systemd/network/*.network /etc/systemd/network/*.link; do
        [ -f "$file" ] && networkd_gives_mac "$file" && echo "$file"
    done
    for file in /etc/NetworkManager/system-connections/*; do
        [ -f "$file" ] && grep -Eq '^cloned-mac-address=([0-9A-Fa-f]{2}:){5}' "$file" && echo "$file"
    done
    for file in /etc/sysconfig/network-scripts/ifcfg-*; do
        [ -f "$file" ] && grep -q '^MACADDR=' "$file" && echo "$file"
    done
    for file in /etc/netplan/*.yaml; do
        [ -f "$file" ] && netplan_gives_mac "$file" && echo "$file"
    done
    return 0
}

# systemd takes blanks before a key and around its `=`.
networkd_fixed() { grep -Eq '^[[:space:]]*(Address|Gateway)[[:space:]]*=' "$1"; }

networkd_gives_mac() {
    awk '/^[ \t]*\[/ { link = $1 == "[Link]" }
        link && /^[ \t]*MACAddress[ \t]*=/ { found = 1 }
        END { exit !found }' "$1"
}

# `macaddress` below `match` only finds a card.
netplan_gives_mac() {
    awk '
        { match($0, /^ */); deep = RLENGTH }
        /^ *(#.*)?$/ { next }
        inside && deep <= under { inside = 0 }
        /^ *match:/ { inside = 1; under = deep; next }
        !inside && /^ *macaddress:/ { found = 1 }
        END { exit !found }' "$1"
}

# Its generator has run before any of our units did.
netplan_again() { ! has netplan || try netplan generate; }
