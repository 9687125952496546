#!/bin/sh
# Sourced by keeper, which has the links: what the server is told, and the two ways that a local disk gets its content.
#
#   copy first      what has data is copied, then the system starts from the local disk
#   stream          the system runs from the server; the kernel's mirror fills the local disk and then is taken away
#
# All variables in capitals are keeper's.
# shellcheck disable=SC2086 # MEET is a path without blanks

# --- what the server is told ----------------------------------------------------------------------------------------

# Sets READ and WRITTEN to the bytes that came from the server and went there since this boot.
count_bytes() {
    READ=0 WRITTEN=0
    for disk in $RWS_DISKS; do
        minor=$(x dmsetup info -c --noheadings -o minor "rewind-src-$disk")
        read -r _ _ sectors _ _ _ more _ <"/sys/block/dm-$minor/stat"
        READ=$((READ + sectors * 512)) WRITTEN=$((WRITTEN + more * 512))
    done
}

# Durable at the server when it returns 0.
put_record() { # state, done bytes
    count_bytes
    {
        echo "rewind 1"
        echo "state $1"
        echo "done ${2:-0}"
        echo "total $TOTAL"
        echo "read $READ"
        echo "written $WRITTEN"
        echo "boots $BOOTS"
        echo "copied ${COPIED:-0}"
        [ -z "$FILL" ] || echo "fill $FILL"
        [ -z "$SERVICE" ] || echo "service $SERVICE"
        [ ! -s $MEET/error ] || echo "error $(head -n 1 $MEET/error)"
        if [ -e $MEET/plan ]; then plan_identities; else grep '^local ' $MEET/record; fi
        echo end
    } >/tmp/record
    to_control 0 </tmp/record
}

plan_identities() { sed 's/^\([^ ]*\) [^ ]* [^ ]* /local \1 /' $MEET/plan; }

read_record() {
    from_control count=1 | tr -d '\000' >/tmp/found
    BOOTS=$(($(sed -n 's/^boots //p' /tmp/found | grep -x '[0-9]*' || echo 0) + 1))
    COPIED=$(sed -n 's/^copied //p' /tmp/found)
    FILL=$(sed -n 's/^fill \([0-9a-f]*\)$/\1/p' /tmp/found)
    SERVICE=$(sed -n 's/^service //p' /tmp/found)
    # shellcheck disable=SC2034
    STATE=$(sed -n 's/^state //p' /tmp/found)
    mv /tmp/found $MEET/record
}

# Progress is told while nothing waits for it.
note() { # state, done bytes
    if [ -z "$noting" ] || ! kill -0 "$noting" 2>/dev/null; then
        put_record "$@" &
        noting=$!
    fi
}

# Waits for one that is under way, or it could come after this one.
state() {
    [ -z "$noting" ] || wait "$noting"
    until put_record "$@"; do sleep 1; done
}

# The last word, which a server may not be there for any more.
say_goodbye() {
    note detached "$TOTAL"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 "$noting" 2>/dev/null || return 0
        sleep 1
    done
}

show() { # words, done bytes
    tenth=$(($2 / (TOTAL / 10 + 1)))
    [ "$tenth" = "$shown" ] || tell "$1: $(($2 / 1048576)) of $((TOTAL / 1048576)) MiB"
    shown=$tenth
    doing "$1: $(($2 / 1048576)) of $((TOTAL / 1048576)) MiB"
}

local_of() { echo "/dev/$(sed -n "s/^$1 \([^ ]*\) .*/\1/p" $MEET/plan)"; }
local_number() { sed -n "s/^$1 [^ ]* \([^ ]*\) .*/\1/p" $MEET/plan; }

# What the local disks have in memory of their own is on them when this returns 0.
settle() {
    for disk in $RWS_DISKS; do
        dd if=/dev/null of="$(local_of "$disk")" bs=512 count=0 conv=notrunc,fsync 2>/dev/null || return 1
    done
}

# --- copy first -----------------------------------------------------------------------------------------------------

# The server's list of what has data, a line for each piece: DISK OFFSET LENGTH ZERO in bytes. A boot that was broken
# off goes on at the piece that was last known to be on the disk.
copy_all() {
    from_control skip=16 | tr -d '\000' >/tmp/pieces
    if [ "$(tail -n 1 /tmp/pieces)" != end ]; then lost "the list of what has data is not whole" && return 1; fi
    number=0 bytes=0 since=$(now)
    while read -r disk offset length zero; do
        [ "$disk" != end ] || break
        number=$((number + 1)) bytes=$((bytes + length))
        [ "$number" -gt "${COPIED:-0}" ] || continue
        if ! copy_piece "$disk" "$offset" "$length" "$zero"; then
            lost "disk $disk cannot be copied at byte $offset: $(tail -n 1 /tmp/dd)" && return 1
        fi
        if [ $(($(now) - since)) -ge 5 ]; then
            since=$(now)
            settle && mark "begun $FILL" && COPIED=$number && note copying "$bytes"
            show "copying" "$bytes"
        fi
    done </tmp/pieces
    settle || ! lost "the local disk does not keep what was written to it"
}

copy_piece() { # disk, offset, length, zero
    from=/dev/mapper/rewind-src-$1 to=$(local_of "$1")
    if [ "$4" = 1 ]; then
        [ -z "$RWS_BLANK" ] || return 0 # it was promised that a local disk reads as zeros
        from=/dev/zero
    fi
    dd if="$from" of="$to" bs=1M skip="$2" seek="$2" count="$3" iflag=skip_bytes,count_bytes,fullblock oflag=seek_bytes \
        conv=notrunc 2>/tmp/dd
}

# --- fill while the system runs -------------------------------------------------------------------------------------

sectors() { x dmsetup table "rewind-$1" | cut -d' ' -f2; }

# One step of the kernel: no program has to run while the disk is suspended. Requests that wait are kept.
swap_table() { # disk, target and its words
    x dmsetup load "rewind-$1" --table "0 $(sectors "$1") $2" && x dmsetup resume --noflush --nolockfs "rewind-$1"
}

# The kernel copies region by region. Reads come from the served disk; what is written goes there, and where a region is
# equal already to both.
begin_filling() {
    swap_table "$1" "mirror core 1 $RWS_REGION 2 /dev/mapper/rewind-src-$1 0 $(local_number "$1") 0 1 handle_errors"
}

# Sets REGIONS ("3/128") and HEALTH (a letter for each side, A: well) of a disk.
look_at() {
    REGIONS=0/1 HEALTH=AA
    # shellcheck disable=SC2046 # words
    set -- $(x dmsetup status "rewind-$1")
    while [ $# -gt 2 ]; do
        case $1 in [0-9]*/[0-9]*) REGIONS=$1 HEALTH=$3 ;; esac
        shift
    done
}

# Until all are in sync, and on the local disks. Fails when a local disk is of no use.
fill() {
    for disk in $RWS_DISKS; do begin_filling "$disk" || { without_local "$disk" && return 1; }; done
    while :; do
        bytes=0 left=''
        for disk in $RWS_DISKS; do
            look_at "$disk"
            bytes=$((bytes + ${REGIONS%/*} * RWS_REGION * 512))
            [ "${REGIONS%/*}" = "${REGIONS#*/}" ] || left=yes
            case $HEALTH in
                AA) ;;
                # Of the served side: what was being written is kept by the kernel, and both sides get it once more.
                [!A]*) begin_filling "$disk" && left=yes && sleep 3 ;;
                *) without_local "$disk" && return 1 ;;
            esac
        done
        [ "$bytes" -le "$TOTAL" ] || bytes=$TOTAL # the last region may be a part of one
        show "filling the local disks" "$bytes"
        [ -n "$left" ] || break
        mark "begun $FILL"
        note filling "$bytes"
        sleep 2
    done
    well
}

# A write that the local disk did not take is held by the kernel: it must not be the only side by then.
well() {
    settle || { without_local "${RWS_DISKS%% *}" && return 1; }
    for disk in $RWS_DISKS; do
        look_at "$disk"
        [ "$HEALTH" = AA ] || { without_local "$disk" && return 1; }
    done
}

# The system goes on as it is, from the server alone.
without_local() {
    for disk in $RWS_DISKS; do swap_table "$disk" "linear /dev/mapper/rewind-src-$disk 0"; done
    echo "local disk $(local_of "$1") cannot be filled" >$MEET/error
    tell "local disk $(local_of "$1") cannot be filled: the system goes on from the server"
    state booting
}

# The server must know first: a boot after a power cut in between would fill the local disks with an older state.
stand_alone() {
    state alone "$TOTAL"
    for disk in $RWS_DISKS; do
        until swap_table "$disk" "linear $(local_number "$disk") 0"; do sleep 1; done
        x dmsetup remove "rewind-hold-$disk"
        blockdev --flushbufs "$(local_of "$disk")" # what was seen there before it was filled
    done
}

# --- marks ----------------------------------------------------------------------------------------------------------

# A line on a local disk that tells what it is: `rewind SESSION DISK begun FILL` while it gets its content, and without
# the last words once it is complete: then the same medium starts it without asking anybody. What the hardware says of a
# disk is not enough: two virtual disks may say the same. FILL is in the record as well, and there first: what it tells
# is true of the disks that have its FILL, and of none that another machine began to fill before.
#
# It is behind the client's last sector, where nobody looks; on a disk that has no room there it is in the gap before the
# first partition, if the client has nothing but zeros there.
choose_places() {
    for disk in $RWS_DISKS; do
        page=$((($(of_disk SECTORS "$disk") + 7) / 8))
        if [ $(($(blockdev --getsz "$(local_of "$disk")") / 8)) -le "$page" ]; then
            page=$(of_disk GAP "$disk")
            [ -z "$page" ] || [ -z "$(text_at "/dev/mapper/rewind-src-$disk" "$page")" ] || page=''
        fi
        [ -n "$page" ] || tell "disk $disk has no room for a mark: only the server knows whether it is complete"
        echo "$page" >"/tmp/place.$disk"
    done
}

text_at() { dd if="$1" bs=4096 skip="$2" count=1 2>/dev/null | tr -d '\000' | head -c 200; } # device, page

mark() { # words
    for disk in $RWS_DISKS; do
        page=$(cat "/tmp/place.$disk") device=$(local_of "$disk")
        [ -n "$page" ] || continue
        if [ "$page" = "$(of_disk GAP "$disk")" ]; then
            blockdev --flushbufs "$device" # the client writes by another way
            case $(text_at "$device" "$page") in '' | "rewind $RWS_SESSION $disk"*) ;; *) continue ;; esac
        fi
        echo "rewind $RWS_SESSION $disk${1:+ $1}" |
            dd of="$device" bs=4096 seek="$page" count=1 conv=sync,notrunc,fsync 2>/dev/null
    done
}

# --- the two ways ----------------------------------------------------------------------------------------------------

# Goes on with what the boot before has begun, or begins anew, on disks that have not its mark.
begin() {
    # shellcheck disable=SC2153 # BOOT is keeper's
    [ -e $MEET/same ] || FILL=$BOOT COPIED=0
    SERVICE='' # of this boot, from now on
}

# The system says that it is up; one that cannot is given RWS_START seconds.
until_booted() {
    begun=$(now)
    while [ ! -e $MEET/booted ] && [ $(($(now) - begun)) -lt "$RWS_START" ]; do sleep 1; done
    count_bytes
    [ ! -e $MEET/booted ] || SERVICE="$(now) $READ $WRITTEN"
}

copy_first() {
    begin
    state copying 0
    choose_places
    mark "begun $FILL"
    copy_all || return
    state alone "$TOTAL"
    mark
    say_goodbye
    : >$MEET/alone
}

# The disks are complete since a boot before, whose power went before it could say all of that.
end_session() {
    choose_places
    mark
    say_goodbye
}

stream() {
    begin
    state booting
    until_booted
    note booting
    choose_places
    mark "begun $FILL"
    if fill; then
        stand_alone
        mark
        say_goodbye
        tell "the local disks are complete; the server is not needed any more"
        : >$MEET/quit
    fi
}
