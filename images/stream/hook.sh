#!/bin/sh
# Sourced by init (images/template/init.sh) once the drivers are in: the root comes from a served point, and the local
# disks fill from it. Decides which local disk stands for which disk of the client, refuses what would destroy or not
# fit, and puts the client's disks together. What has to outlive the initrd is `keeper`.
#
#   /rw/stream.conf       RWS_* settings (images/stream/settings.py)
#   /run/rewind/          where the two meet: keeper says ready, lost, alone, gone; this says plan, same, go, quit,
#                         error, refused (it does not start)
#
#   rewind-src-DISK       the served disk, by a link that waits while the server is away       (keeper)
#   rewind-DISK           the client's disk: first the served one, then both, then the local one
#   rewind-DISK1 ...      its partitions, at the places that the builder found
#   rewind-hold-DISK      keeps others' hands off the local disk until it is the client's
# shellcheck disable=SC2034 # ROOT, RW_USR, LVM are init's
MEET=/run/rewind
RWS_LOOK=30
# shellcheck disable=SC1091 # a file of the image
. /rw/stream.conf

# Nobody but us makes the nodes here.
dm() { (export DM_DISABLE_UDEV=1 && x dmsetup "$@"); }

# The value of a setting that each disk has: of_disk LOCAL vda
of_disk() { eval "echo \"\$RWS_$1_$(echo "$2" | tr -c 'A-Za-z0-9\n' _)\""; }

stream_refuse() {
    : >$MEET/refused
    echo "$*" >$MEET/error # keeper tells the server
    sleep 3
    fail "$@"
}

# --- the link -------------------------------------------------------------------------------------------------------

start_keeper() {
    mkdir $MEET
    chmod 700 $MEET
    # Partitions of the link would be the client's partitions a second time.
    driver=$(grep '/nbd\.ko$' /rw/modules) && rmmod nbd && insmod "/lib/modules/$(uname -r)/$driver" max_part=0
    unshare -m /bin/busybox sh /rw/keeper enter &
}

# Waits for a word of keeper's, and shows each 10 s what it waits for. keeper itself ends a waiting that is too long.
await() {
    shown=$(now)
    while [ ! -e "$MEET/$1" ]; do
        [ ! -e $MEET/lost ] || stream_refuse "$(cat $MEET/lost)"
        if [ $(($(now) - shown)) -ge 10 ]; then
            shown=$(now)
            tell "$2: $(cat $MEET/doing 2>/dev/null)"
        fi
        sleep 0.2
    done
}

# --- local disks ----------------------------------------------------------------------------------------------------

# Names of the disks of this machine that a client's disk could go to: no media, and not what we were started from.
local_disks() {
    for path in /sys/block/*; do
        name=${path##*/}
        case $name in nbd* | dm-* | loop* | ram* | zram* | sr* | fd* | md*) continue ;; esac
        [ "$(cat "$path/removable")$(cat "$path/ro")" = 00 ] || continue
        [ "$(cat "$path/size")" -gt 0 ] || continue
        case " $(x blkid -c /dev/null -s LABEL -o value "/dev/$name"* 2>/dev/null | tr '\n' ' ')" in
            *" REWIND "*) ;;
            *) echo "$name" ;;
        esac
    done
}

# What tells a disk from another one, in one word: the identity that the hardware gives it, and its size.
identity() {
    for file in wwid device/wwid serial device/serial; do
        word=$(tr -cd 'A-Za-z0-9._:-' <"/sys/block/$1/$file" 2>/dev/null)
        [ -z "$word" ] || break
    done
    echo "${word:-none}/$(cat "/sys/block/$1/size")"
}

is_named() { # disk, name: whether it is what was asked for by its node or a part of its identity
    case $2 in
        /dev/*) [ "/dev/$1" = "$2" ] ;;
        *) case $(identity "$1") in *"$2"*) true ;; *) false ;; esac ;;
    esac
}

# Sets LOCAL to the disk for the client's disk $1 of $2 sectors. The firmware may still be looking for disks.
find_local() {
    wanted=$(of_disk LOCAL "$1") LOCAL='' begun=$(now)
    while [ -z "$LOCAL" ]; do
        fitting='' small='' count=0
        for name in $(local_disks); do
            case " $TAKEN " in *" $name "*) continue ;; esac
            [ -z "$wanted" ] || is_named "$name" "$wanted" || continue
            if [ "$(cat "/sys/block/$name/size")" -ge "$2" ]; then
                fitting="$fitting $name" LOCAL=$name count=$((count + 1))
            else
                small="$small $name ($(($(cat "/sys/block/$name/size") / 2048)) MiB)"
            fi
        done
        [ "$count" -le 1 ] || stream_refuse "disk $1 could go to each of$fitting: say which one by --local $1=DEVICE"
        [ -n "$LOCAL" ] || [ $(($(now) - begun)) -lt "$RWS_LOOK" ] || break
        [ -n "$LOCAL" ] || sleep 1
    done
    [ -n "$LOCAL" ] || [ -z "$small" ] || stream_refuse "local disk$small is smaller than disk $1 ($(($2 / 2048)) MiB)"
    [ -n "$LOCAL" ] || stream_refuse "there is no local disk${wanted:+ $wanted} for disk $1"
    TAKEN="$TAKEN $LOCAL"
}

check_local() { # disk, local
    grain=$(cat "/sys/block/$2/queue/logical_block_size")
    [ "$grain" -le 512 ] ||
        stream_refuse "local disk $2 has sectors of $grain bytes, and disk $1 of the guest has such of 512"
    if [ -n "$RWS_OVERWRITE" ] || is_ours "$1" "$2"; then return 0; fi
    dd if="/dev/$2" of=/tmp/begin bs=64k count=16 2>/dev/null || stream_refuse "local disk $2 cannot be read"
    [ "$(tr -d '\000' </tmp/begin | head -c 1 | wc -c)" = 0 ] ||
        stream_refuse "local disk $2 is not empty: --overwrite would give its content up for disk $1"
}

# What the local disk said of itself that the client's disk $1 began to fill in a boot before this one.
was_ours() { sed -n "s/^local $1 //p" $MEET/record; }

# Which filling the record is of: the word that the marks of its disks have as well.
was_filling() { sed -n 's/^fill \([0-9a-f]*\)$/\1/p' $MEET/record; }

# Whether what is on it is of this session, of any filling. Where there is room for a mark behind the client's last
# sector, it was written before anything else. Where there is none, and the client has written over the one in its gap,
# hardware that says who it is is believed; a size alone is that of many disks, and the client's table has to be there.
is_ours() { # disk, local
    [ "$(was_ours "$1")" = "$(identity "$2")" ] || return 1
    if is_marked "$1" "$2" ' begun *' || is_marked "$1" "$2" ''; then return 0; fi
    [ $(($(cat "/sys/block/$2/size") / 8)) -le $((($(of_disk SECTORS "$1") + 7) / 8)) ] || return 1
    # QEMU counts the SATA and IDE disks of a machine where nobody has given them a serial number.
    case $(identity "$2") in none/* | *QM000[0-9][0-9]/*) begins_as_served "$1" "$2" ;; esac
}

# Zeros, and nothing that could be read, are no table: any file system on a whole disk may begin with zeros.
begins_as_served() { # disk, local
    head=$(head_of "/dev/$2")
    case $head in "$(head_of /dev/zero)" | "$(head_of /dev/null)") return 1 ;; esac
    [ "$head" = "$(head_of "/dev/mapper/rewind-src-$1")" ]
}

head_of() { dd if="$1" bs=4096 count=1 2>/dev/null | md5sum; }

# Whether it is the one that the record is of. Another one may say the same of itself, and be of this session as well.
is_recorded() { # disk, local
    is_marked "$1" "$2" " begun $(was_filling)" || is_marked "$1" "$2" ''
}

is_marked() { # disk, local, what comes behind the disk's name, as a pattern
    for page in $((($(of_disk SECTORS "$1") + 7) / 8)) $(of_disk GAP "$1"); do
        mark=$(dd if="/dev/$2" bs=4096 skip="$page" count=1 2>/dev/null | tr -d '\000' | head -n 1)
        # shellcheck disable=SC2254 # a pattern
        case $mark in "rewind $RWS_SESSION $1"$3) return 0 ;; esac
    done
    return 1
}

# Whether the local disks are complete: then each has the mark of that (fill.sh).
all_marked() {
    for disk in $RWS_DISKS; do
        found=''
        for name in $(local_disks); do ! is_marked "$disk" "$name" '' || found=$name; done
        [ -n "$found" ] || return 1
    done
}

# After the end of a session its local disks are the client. They are looked for by what the machine has said of them,
# and one that another machine began to fill is none: whoever has no other was started from the image of somebody else.
find_own() {
    begun=$(now)
    for disk in $RWS_DISKS; do
        until has_own "$disk"; do
            [ $(($(now) - begun)) -lt "$RWS_LOOK" ] ||
                stream_refuse "the session is over, and disk $disk is not in this machine: $(was_ours "$disk")"
            sleep 1
        done
    done
}

has_own() {
    for name in $(local_disks); do
        [ "$(was_ours "$1")" = "$(identity "$name")" ] || continue
        # One without a mark may have had no place for it, or a client that has grown over it since.
        if is_recorded "$1" "$name" || ! is_marked "$1" "$name" ' begun *'; then return 0; fi
    done
    return 1
}

# For keeper, which has the last word to say where the power went before it: a plan of disks that have the mark of what
# was filled last, and none where one has not. What a disk says of itself is too little to write to it.
plan_own() {
    for disk in $RWS_DISKS; do
        found=''
        for name in $(local_disks); do
            [ "$(was_ours "$disk")" = "$(identity "$name")" ] || continue
            if is_recorded "$disk" "$name"; then found=$name; fi
        done
        [ -n "$found" ] || return 0
        echo "$disk $found $(cat "/sys/block/$found/dev") $(identity "$found")" >>/tmp/plan
    done
    mv /tmp/plan $MEET/plan
}

# --- the client's disks ---------------------------------------------------------------------------------------------

choose_locals() {
    TAKEN='' same=yes
    for disk in $RWS_DISKS; do
        find_local "$disk" "$(of_disk SECTORS "$disk")"
        check_local "$disk" "$LOCAL"
        is_marked "$disk" "$LOCAL" " begun $(was_filling)" || same=''
        echo "$disk $LOCAL $(cat "/sys/block/$LOCAL/dev") $(identity "$LOCAL")"
        tell "disk $disk goes to $LOCAL"
    done >/tmp/plan
    [ -z "$same" ] || : >$MEET/same # what was copied before is there
    mv /tmp/plan $MEET/plan
}

map() { # name, id, table
    dm create "$1" ${2:+-u "$2"} --table "$3" >/tmp/dm 2>&1 ||
        stream_refuse "$1 ($3) cannot be put together: $(tail -n 1 /tmp/dm)"
    blockdev --setra 1024 "/dev/mapper/$1" # 512 KiB, against the latency of a network
}

put_together() {
    while read -r disk name number _; do
        size=$(of_disk SECTORS "$disk")
        map "rewind-hold-$disk" "" "0 $(cat "/sys/block/$name/size") linear $number 0"
        map "rewind-$disk" "rewind-$disk" "0 $size linear /dev/mapper/rewind-src-$disk 0"
        for part in $(of_disk PARTS "$disk"); do # NAME:NUMBER:OFFSET:LENGTH in sectors
            IFS=: read -r part index begin length <<EOF
$part
EOF
            # The id is of the form that tells blkid which partition of which disk it is.
            map "rewind-$part" "part$index-rewind-$disk" "0 $length linear /dev/mapper/rewind-$disk $begin"
        done
    done <$MEET/plan
}

# For the client's own system. Its udev knows nothing of maps that were made without it, and must not find the same
# file system a second time, on the link or on the local disk.
hide() { echo "KERNEL==\"$1\", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=\"1\", ENV{SYSTEMD_READY}=\"0\""; }

lay_rules() {
    mkdir -p /run/udev/rules.d /run/systemd/system/multi-user.target.d
    {
        echo 'SUBSYSTEM!="block", GOTO="rewind_end"'
        for name in $RWS_SHOWN; do
            echo "KERNEL==\"dm-*\", ATTR{dm/name}==\"rewind-$name\", ENV{DM_UDEV_PRIMARY_SOURCE_FLAG}=\"1\""
        done
        while read -r _ name _; do
            hide "$name|${name}[0-9]*|${name}p[0-9]*"
        done <$MEET/plan
        hide 'nbd*'
        echo 'LABEL="rewind_end"'
    } >/run/udev/rules.d/09-rewind.rules
    cat >/run/systemd/system/rewind-booted.service <<'EOF'
[Unit]
Description=Tell Rewind that the local disks may be filled now
DefaultDependencies=no
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/touch /run/rewind/booted
EOF
    printf '[Unit]\nWants=rewind-booted.service\n' >/run/systemd/system/multi-user.target.d/rewind.conf
}

stream_root() {
    [ -z "$RWS_ROOT" ] || ROOT=$RWS_ROOT
    [ -z "$RWS_USR" ] || RW_USR="$RWS_USR ${RW_USR#* }"
    # The same volumes are seen on the link, and on a local disk that was half filled before.
    LVM='activation{udev_sync=0 udev_rules=0 monitoring=0} devices{use_devicesfile=0'
    LVM="$LVM global_filter=[\"a|^/dev/mapper/rewind-[^-]*\$|\",\"r|.*|\"]}"
}

# --- the way --------------------------------------------------------------------------------------------------------

stream_alone() {
    : >$MEET/quit
    await gone "lets the server go"
    tell "the local disks are complete: starting from them alone"
    while read -r name; do blockdev --rereadpt "/dev/$name" 2>/dev/null; done <<EOF
$(local_disks)
EOF
}

if all_marked; then
    tell "the local disks are complete: starting from them alone"
else
    start_keeper
    # shellcheck disable=SC2153 # of stream.conf
    await ready "waiting for the server $RWS_ADDRESS:$RWS_PORT"
    case $(sed -n 's/^state //p' $MEET/record) in
        alone | detached)
            find_own
            plan_own
            stream_alone
            ;;
        *)
            choose_locals
            if [ "$RWS_MODE" = copy ]; then
                : >$MEET/go
                await alone "copying"
                stream_alone
            else
                put_together
                lay_rules
                stream_root
                : >$MEET/go
                tell "the root comes from $RWS_ADDRESS:$RWS_PORT; the local disks fill once the system runs"
            fi
            ;;
    esac
fi
