#!/bin/sh
# Tells what this system is, once its boot has ended, on a serial line: `report DEVICE [ROOT]`. Run by the system itself
# when its image is one that is being verified. It changes nothing. Lines of a word, a blank and a text:
#
#   rewind-report begin          … facts …          file DIGEST PATH   link PATH          rewind-report end
#
# Digests are the first 16 digits of SHA-256. With ROOT it tells at once, and only what lies in that folder.
set -u
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
port=$1 root=${2:-}

# One fact; its text is the standard input, of which lines become blanks.
fact() { printf '%s %s\n' "$1" "$(tr -s '\n' ' ' | tr -d '\000-\037\177' | cut -c 1-4000)"; }

each() { tr -d '\000-\011\013-\037\177' | cut -c 1-1000 | sed "s/^/$1 /"; }

# Of addresses in the kernel's tables: `tcp 22`. Ports are four digits of base 16, which not every awk can read.
listening() {
    awk 'function number(hex, i, sum) {
            for (i = 1; i <= length(hex); i++) sum = sum * 16 + index("0123456789ABCDEF", substr(hex, i, 1)) - 1
            return sum
        }
        FNR == 1 { kind = FILENAME; sub(/.*\//, "", kind); sub(/6$/, "", kind); next }
        kind == "tcp" && $4 != "0A" || kind == "udp" && $4 != "07" { next }
        { n = split($2, part, ":"); print kind, number(part[n]) }' /proc/net/tcp /proc/net/tcp6 /proc/net/udp \
        /proc/net/udp6 2>/dev/null | sort -u
}

# A service that was started need not answer yet, and one that will fail may not have failed: wait until nothing has
# begun to listen for five seconds, for thirty at most.
settle() {
    before='' same=0 left=30
    while [ "$same" -lt 5 ] && [ "$left" -gt 0 ]; do
        now=$(listening)
        [ "$now" = "$before" ] || same=0
        before=$now same=$((same + 1)) left=$((left - 1))
        sleep 1
    done
}

running() {
    uname -r | fact kernel
    uname -n | fact running_host_name
    fact command_line </proc/cmdline
    fact boot_id </proc/sys/kernel/random/boot_id
    systemctl is-system-running | fact system
    systemctl list-units --failed --plain --no-legend --no-pager | awk '{ print $1 }' | each failed
    listening | each listening
    awk '$2 == "/" { print $1, $3 }' /proc/mounts | tail -n 1 | fact root
    for card in /sys/class/net/*; do
        [ ! -e "$card/device" ] || printf '%s %s %s\n' "${card##*/}" "$(cat "$card/address")" "$(cat "$card/operstate")"
    done | each card
    [ ! -d /sys/firmware/efi ] || echo yes | fact efi
}

# What must be as it was in the point.
lying() {
    fact host_name <"$root/etc/hostname"
    fact machine_id <"$root/etc/machine-id"
    sed -n 's/^PRETTY_NAME="*\([^"]*\)"*$/\1/p' "$root/etc/os-release" | fact system_name
    if [ -f "$root/var/lib/dpkg/status" ]; then
        grep -c '^Status: install ok installed$' "$root/var/lib/dpkg/status" | fact packages
    elif [ -z "$root" ] && command -v rpm >/dev/null; then
        rpm -qa | wc -l | fact packages
    fi
    find "$root/etc" "$root/var/lib/dpkg/status" -xdev -type f -exec sha256sum {} + |
        sed -n "s|^\\([0-9a-f]\\{16\\}\\)[0-9a-f]*  $root\\(/.*\\)|file \\1 \\2|p"
    find "$root/etc" -xdev -type l | sed -n "s|^$root\\(/.*\\)|link \\1|p"
} 2>/dev/null

if [ -n "$root" ]; then
    lying >"$port"
    exit
fi
stty -F "$port" raw -echo
echo 'rewind-report begin' >"$port"
# It answers when nothing is starting any more, or when systemd is too old to wait.
timeout 240 systemctl is-system-running --wait >/dev/null 2>&1
settle
{
    running
    lying
    echo 'rewind-report end'
} >"$port" 2>/dev/null
