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

# A copy of a file before it is changed for the first time, in the client's own /var/lib/rewind/before.
save() {
    [ -e "$1" ] || return 0
    [ ! -e "$RW_STATE/before$1" ] || return 0
    mkdir -p "$RW_STATE/before${1%/*}" && cp -a "$1" "$RW_STATE/before$1"
}

# Puts new content, the standard input, in the place of a file, in one moment and with the old one's owner and mode.
replace() {
    save "$1" || return 1
    [ ! -e "$1" ] || cp -a "$1" "$1.rewind-new" || return 1
    cat >"$1.rewind-new" && sync "$1.rewind-new" && mv "$1.rewind-new" "$1"
}

# The disks (sda nvme0n1) below what is mounted at $1, through all layers.
disks_below() {
    source=$(findmnt -nvo SOURCE --target "$1") || return 1
    lsblk -nrso NAME,TYPE "$source" | awk '$2 == "disk" && !seen[$1]++ { print $1 }'
}

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
