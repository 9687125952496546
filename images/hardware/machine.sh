#!/bin/sh
# Prints what hardware this machine has, as one JSON document that `rewind image target add --script FILE` reads.
#
#   sh machine.sh >target.json         on the machine itself, under any Linux: installed, live, or a rescue system
#
# Only reads /sys and /proc; writes nothing, loads nothing, asks no network. Needs a POSIX shell (dash, busybox ash) and
# od, sed, tr, uname. Root is not needed, except for the MAC address of a bonded card on some kernels.
# For tests: an argument is put before /sys and /proc.
set -u
LC_ALL=C
export LC_ALL
root=${1:-}

# Text as a JSON string. DMI texts are whatever a vendor typed: what is not printable ASCII is left out. Most texts need
# nothing, and a process for each of a thousand aliases would take seconds on a small machine.
quote() {
    case $1 in
        *[!A-Za-z0-9._:,/\ +=-]*)
            printf '"%s"' "$(printf '%s' "$1" | tr -cd '\040-\176' | sed 's/[\\"]/\\&/g')"
            ;;
        *) printf '"%s"' "$1" ;;
    esac
}

# The first line of a file, empty when there is none.
line() {
    text=
    [ ! -r "$1" ] || IFS= read -r text <"$1" 2>/dev/null || :
    printf '%s' "$text"
}

# The last part of where a symbolic link leads; without readlink, which POSIX does not have.
link_end() {
    (cd -P -- "$1" 2>/dev/null && printf '%s' "${PWD##*/}")
}

name() {
    # shellcheck disable=SC2018,SC2019 # in the C locale these are all letters; not every busybox knows classes
    text=$(line "$root/sys/class/dmi/id/product_name" | tr 'A-Z' 'a-z' | tr -c 'a-z0-9_-' '-')
    text=$(printf '%.63s' "$text" | sed 's/^[_-]*//; s/[_-]*$//')
    printf '%s' "${text:-machine}"
}

firmware() {
    if [ -d "$root/sys/firmware/efi" ]; then printf uefi; else printf bios; fi
}

# The fifth byte of the variable; the first four are its attributes.
secure_boot() {
    file=$root/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c
    value=0
    if [ -r "$file" ]; then
        # shellcheck disable=SC2046 # words are meant
        set -- $(od -An -tu1 "$file")
        value=${5:-0}
    fi
    if [ "$value" = 1 ]; then printf true; else printf false; fi
}

tpm() {
    if [ -e "$root/sys/class/tpm/tpm0" ]; then printf true; else printf false; fi
}

memory() {
    kib=0
    while read -r key value _; do
        [ "$key" != MemTotal: ] || kib=$value
    done 2>/dev/null <"$root/proc/meminfo" || :
    printf '%s' "$((kib * 1024))"
}

# The last serial line that the running kernel speaks on, else the first that has a chip behind it.
console() {
    found=
    for one in $(line "$root/sys/class/tty/console/active"); do
        case $one in ttyS* | hvc*) found=$one ;; esac
    done
    for port in "$root"/sys/class/tty/ttyS[0-9]*; do
        [ -z "$found" ] || break
        kind=$(line "$port/type")
        case $kind in '' | 0) ;; *) found=${port##*/} ;; esac
    done
    printf '%s' "$found"
}

# Each device with an alias. All CPUs have one together: drivers for ciphers are chosen by it.
devices() {
    comma=
    for file in "$root"/sys/bus/*/devices/*/modalias "$root/sys/devices/system/cpu/modalias"; do
        alias=
        [ ! -r "$file" ] || IFS= read -r alias <"$file" 2>/dev/null || :
        case $alias in
            *:*) ;;
            *) continue ;;
        esac
        folder=${file%/modalias}
        driver=
        [ ! -e "$folder/driver" ] || driver="driver $(link_end "$folder/driver")"
        printf '%s\n  {"modalias": ' "$comma"
        quote "$alias"
        printf ', "slot": '
        quote "${folder##*/}"
        printf ', "description": '
        quote "$driver"
        printf '}'
        comma=,
    done
}

# Network interfaces that are a piece of hardware with an address of six bytes. Radio is not what a server is
# reached by.
nics() {
    comma=
    for folder in "$root"/sys/class/net/*; do
        [ -r "$folder/device/modalias" ] || continue
        mac=$(line "$folder/bonding_slave/perm_hwaddr")
        mac=${mac:-$(line "$folder/address")}
        case $mac in
            ??:??:??:??:??:??) ;;
            *) continue ;;
        esac
        wanted=true
        if [ -d "$folder/wireless" ] || [ -e "$folder/phy80211" ]; then wanted=false; fi
        printf '%s\n  {"modalias": ' "$comma"
        quote "$(line "$folder/device/modalias")"
        printf ', "mac": '
        quote "$(printf '%s' "$mac" | tr 'A-F' 'a-f')"
        printf ', "slot": '
        quote "$(link_end "$folder/device")"
        printf ', "wanted": %s}' "$wanted"
        comma=,
    done
}

notes() {
    comma=
    for folder in "$root"/sys/class/net/*; do
        [ -r "$folder/device/modalias" ] || continue
        printf '%s\n  ' "$comma"
        quote "${folder##*/} here is $(line "$folder/address") at $(link_end "$folder/device")"
        comma=,
    done
}

arch=$(uname -m)
[ -z "$root" ] || arch=$(line "$root/arch")
printf '{"name": '
quote "$(name)"
printf ',\n "source": "script",\n "firmware": "%s",\n "arch": ' "$(firmware)"
quote "$arch"
printf ',\n "secure_boot": %s,\n "tpm": %s,\n "memory_bytes": %s,\n "console": ' "$(secure_boot)" "$(tpm)" "$(memory)"
quote "$(console)"
printf ',\n "devices": ['
devices
printf '\n ],\n "nics": ['
nics
printf '\n ],\n "notes": ['
notes
printf '\n ]}\n'
