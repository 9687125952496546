#!/bin/sh
# The first program of the one kernel that boots, which is the client's own: load the drivers of this machine, mount the
# client's root as it is, hand over to its init. Runs in busybox's shell; nothing is written to the client's disks.
#
#   /rw/modules      modules to insert, one path a line, in order     /rw/nics    lines "MAC NAME"
#   /rw/conf         RW_* settings (images/template/settings.py)      /rw/root    files to be laid into /run
#   /rw/stream       if there: sourced once the drivers are in, before the root is looked for; may set ROOT
PATH=/bin:/rw/bin
BLKID_FILE=/tmp/blkid # its cache: not in the client's /run
export PATH BLKID_FILE

say() { echo "rewind: $*" >/dev/kmsg 2>/dev/null || echo "rewind: $*"; }
tell() { echo "rewind: $*" >/dev/console 2>/dev/null; say "$@"; }
has() { case " $RW_LAYERS " in *" $1 "*) true ;; *) false ;; esac; }

# A tool with its own loader and libraries: x lvm vgchange ...
x() {
    tool=$1
    shift
    /rw/lib/ld.so --library-path /rw/lib "/rw/bin/$tool" "$@"
}

# --- one step after the other ---------------------------------------------------------------------------------------

mount_kernel_folders() {
    /bin/busybox mkdir -p /proc /sys /dev /run /root /tmp /etc
    /bin/busybox --install -s /bin
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    mount -t tmpfs -o mode=755,nosuid,nodev run /run
    ln -sf /proc/mounts /etc/mtab
}

read_settings() {
    RW_LAYERS='' RW_VOLUME='' RW_LUKS='' RW_ROOT='' RW_FLAGS='' RW_FS='' RW_USR='' RW_WAIT=60 RW_LINGER=60
    RW_FAIL=poweroff
    # shellcheck disable=SC1091 # a file of the image
    [ ! -f /rw/conf ] || . /rw/conf
    ROOT=$RW_ROOT FLAGS=$RW_FLAGS FS=$RW_FS MODE=ro INIT='' DELAY=0
    read -r line </proc/cmdline
    set -f # a word of the command line with a star is not a pattern
    quoted=''
    for word in $line; do
        # A value in quotes may have spaces; what stands in it is no word for us.
        case $word in
            *\"*\"*) ;;
            *\"*)
                if [ -n "$quoted" ]; then quoted=''; else quoted=yes; fi
                continue
                ;;
        esac
        [ -z "$quoted" ] || continue
        case $word in
            root=*) ROOT=${word#root=} ;;
            rootflags=*) FLAGS=${word#rootflags=} ;;
            rootfstype=*) FS=${word#rootfstype=} ;;
            rootdelay=*) DELAY=${word#rootdelay=} ;;
            init=*) INIT=${word#init=} ;;
            ro | rw) MODE=$word ;;
        esac
    done
    set +f
    case $DELAY in '' | *[!0-9]*) DELAY=0 ;; esac
    # Longer, but not for ever: rootwait and rootdelay cannot make the machine hang in silence.
    [ "$DELAY" -le 600 ] || DELAY=600
    RW_WAIT=$((RW_WAIT + DELAY))
}

load_modules() {
    while read -r module; do
        # A driver that finds no hardware for it (an accelerated checksum) says so and is not needed.
        # shellcheck disable=SC2046 # words
        words=$(insmod "/lib/modules/$(uname -r)/$module" $(parameters_of "${module##*/}") 2>&1) ||
            say "module $module: $words"
    done </rw/modules
    say "drivers loaded: $(wc -l </rw/modules)"
}

# What the command line says for a module (nvme_core.multipath=N): only modprobe would pass it on by itself.
parameters_of() {
    name=$(echo "${1%.ko}" | tr - _)
    set -f
    for word in $line; do
        case $word in "$name".*=*) echo "${word#*.}" ;; esac
    done
    set +f
}

# Names that are exchanged (eth0 and eth1) need a name between them.
rename_nics() {
    [ -f /rw/nics ] || return 0
    number=0
    while read -r mac name; do
        for nic in /sys/class/net/*; do
            # Only a card: a bridge or VLAN has the address of one, but no device below it.
            [ -e "$nic/device" ] || continue
            [ "$(cat "$nic/address")" = "$mac" ] || continue
            number=$((number + 1))
            ip link set dev "${nic##*/}" name "rw$number" && echo "rw$number $name" >>/tmp/nics
        done
    done </rw/nics
    [ -f /tmp/nics ] || return 0
    while read -r between name; do
        if ip link set dev "$between" name "$name"; then say "network card $name"; else say "no name $name for $between"; fi
    done </tmp/nics
}

lay_settings() { [ ! -d /rw/root ] || cp -a /rw/root/. /run/; }

# --- the root file system -------------------------------------------------------------------------------------------

# Prints the device of $1 (UUID=, LABEL=, PARTUUID=, PARTLABEL=, /dev/...), nothing when it is not there yet.
device_of() {
    case $1 in
        UUID=* | LABEL=* | PARTUUID=* | PARTLABEL=*) by_tag "$1" ;;
        /dev/disk/by-uuid/*) by_tag "UUID=${1##*/}" ;;
        /dev/disk/by-label/*) by_tag "LABEL=${1##*/}" ;;
        /dev/disk/by-partuuid/*) by_tag "PARTUUID=${1##*/}" ;;
        *) [ ! -b "$1" ] || echo "$1" ;;
    esac
}

by_tag() {
    value=${1#*=}
    value=${value#\"}
    x blkid -c /dev/null -l -o device -t "${1%%=*}=${value%\"}" 2>/dev/null
}

# What lies between disk and root, from the disk up. $1 is not empty in the second half of the waiting: an array may
# then start without a disk that does not come.
bring_up_layers() {
    if has md; then
        if [ -n "$1" ]; then x mdadm --assemble --scan --run; else x mdadm --assemble --scan --no-degraded; fi
    fi
    if has luks; then open_luks; fi
    if has lvm; then activate_volumes; fi
} >/tmp/layers 2>&1

# The root's alone where that is enough. All where /usr is another one, or what is known of the root is no volume but a
# container on one.
activate_volumes() {
    if [ -n "$RW_VOLUME" ] && [ -z "$RW_USR" ]; then
        x lvm lvchange --activate y --sysinit --config "$LVM" "$RW_VOLUME"
    else
        x lvm vgchange --activate y --sysinit --config "$LVM"
    fi
}

# Nobody but us makes the nodes here, and a list of devices of the old machine names none of this one.
LVM='activation{udev_sync=0 udev_rules=0 monitoring=0} devices{use_devicesfile=0}'

# RW_LUKS: words NAME:SPEC. The passphrase is asked for on the console; nothing of it is kept.
open_luks() {
    for pair in $RW_LUKS; do
        [ ! -e "/dev/mapper/${pair%%:*}" ] || continue
        sealed=$(device_of "${pair#*:}")
        [ -n "$sealed" ] || continue
        x cryptsetup open --type luks --tries 5 "$sealed" "${pair%%:*}" </dev/console >/dev/console 2>&1
    done
}

# Sets DEVICE to the device of $1 as soon as it is there. Fails after RW_WAIT seconds.
wait_for() {
    begun=$(now) next=0 shown=0
    while :; do
        DEVICE=$(device_of "$1")
        [ -z "$DEVICE" ] || return 0
        waited=$(($(now) - begun))
        [ "$waited" -lt "$RW_WAIT" ] || return 1
        if [ -n "$RW_LAYERS" ] && [ "$waited" -ge "$next" ]; then
            next=$((waited + 2))
            if [ "$waited" -ge $((RW_WAIT / 2)) ]; then bring_up_layers late; else bring_up_layers ''; fi
            continue
        fi
        if [ "$waited" -ge $((shown + 10)) ]; then
            shown=$waited
            tell "waiting for $1 ($waited of $RW_WAIT s)"
        fi
        sleep 0.2
    done
}

now() { cut -d. -f1 /proc/uptime; }

mount_root() {
    [ -n "$ROOT" ] || fail "the command line names no root file system"
    wait_for "$ROOT" || fail "the root file system $ROOT is not there"
    say "root $ROOT is $DEVICE"
    words=$(mount -o "$MODE${FLAGS:+,$FLAGS}" ${FS:+-t "$FS"} "$DEVICE" /root 2>&1) ||
        fail "$DEVICE cannot be mounted as root ($MODE${FLAGS:+,$FLAGS}${FS:+, $FS}): $words"
}

# systemd wants /usr to be there from the beginning. RW_USR: "SPEC TYPE FLAGS".
mount_usr() {
    [ -n "$RW_USR" ] || return 0
    # shellcheck disable=SC2086 # three words
    set -- $RW_USR
    wait_for "$1" || fail "/usr on $1 is not there"
    words=$(mount -o "ro,$3" -t "$2" "$DEVICE" /root/usr 2>&1) || fail "/usr on $1 cannot be mounted: $words"
}

hand_over() {
    : "${INIT:=/sbin/init}"
    # A link may be absolute, of the client's own tree: that it is there is all we can see of it.
    [ -e "/root$INIT" ] || [ -L "/root$INIT" ] || fail "the root file system $ROOT has no $INIT"
    for folder in proc sys dev run; do
        [ -d "/root/$folder" ] || fail "the root file system $ROOT has no folder /$folder"
    done
    say "handing over to $INIT"
    for folder in proc sys dev run; do mount --move "/$folder" "/root/$folder"; done
    exec switch_root -c /dev/console /root "$INIT" "$@"
}

# --- when it cannot go on -------------------------------------------------------------------------------------------

fail() {
    # A machine that is served and does not start must not hold the place of one that would (images/stream/keeper.sh).
    [ ! -d /run/rewind ] || : >/run/rewind/refused
    tell "CANNOT GO ON: $*"
    tell "disks of this machine: $(sed 1,2d /proc/partitions | while read -r _ _ size name; do echo "$name ($size KiB)"; done | tr '\n' ' ')"
    [ ! -s /tmp/layers ] || tell "arrays, keys and volumes said: $(tail -n 5 /tmp/layers | tr '\n' ' ')"
    tell "nothing was written; $RW_FAIL in $RW_LINGER s, or at once by Enter"
    begun=$(now)
    # shellcheck disable=SC3045,SC2034 # busybox's shell has -t
    while [ $(($(now) - begun)) -lt "$RW_LINGER" ] && ! read -r -t 5 answer </dev/console; do
        sleep 0.2 # a console that takes no input answers at once
    done
    sync
    if [ "$RW_FAIL" = reboot ]; then reboot -f; else poweroff -f; fi
    sleep 10
    echo o >/proc/sysrq-trigger
    while :; do sleep 60; done
}

mount_kernel_folders
read_settings
load_modules
rename_nics
lay_settings
# shellcheck disable=SC1091 # a file of the image
[ ! -f /rw/stream ] || . /rw/stream
mount_root
mount_usr
hand_over "$@"
