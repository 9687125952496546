#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The root's partition takes the room behind it, up to the next one or the end of the disk, then so does what is on it.
# After the boot loader's step, which may need some of that room for itself, also at a later start. The table as it was is kept, and put back if
# the kernel does not take the new one. A start that was cut off in between is gone on with: $growing says so.
has sfdisk || leave "the guest has no sfdisk (fdisk)"
disk=$(disks_below /)
[ -n "$disk" ] && [ "$(printf '%s\n' "$disk" | wc -l)" = 1 ] || leave "the root is not on one disk alone"
source=$(findmnt -nvo SOURCE --target /)
kinds=$(lsblk -nrso TYPE "$source" | tr '\n' ' ')
case $kinds in
    "part disk " | "lvm part disk ") ;;
    *) leave "the root is not on a partition or a logical volume of one: $kinds" ;;
esac
partition=$(lsblk -nrso NAME,TYPE "$source" | awk '$2 == "part" { print $1 }')
here=/sys/class/block

# Where a partition ends, in sectors.
end() { echo $(($(cat "$here/$1/start") + $(cat "$here/$1/size"))); }

before=$(end "$partition")
limit=$(cat "$here/$disk/size")
for start in "$here/$disk/$disk"*/start; do
    start=$(cat "$start")
    if [ "$start" -ge "$before" ] && [ "$start" -lt "$limit" ]; then limit=$start; fi
done
room=$((limit - before))
growing=$RW_STATE/before/$disk.growing
# Less than 16 MiB are the rest of an alignment.
[ "$room" -ge 32768 ] || [ -e "$growing" ] || nothing "there is no room behind /dev/$partition"
mkdir -p "$RW_STATE/before" || fail "$RW_STATE/before cannot be made"

# What the boot loader's step has yet to make on this disk, if it is tried again. A root that has grown gives nothing
# back: ext4 becomes smaller only when nobody uses it, XFS never.
awaited() {
    grep -qsx loader "$RW_HERE/undone" && [ ! -e "$RW_HERE/no-loader" ] || return 0
    [ "$(disks_below /boot)" = "$disk" ] || return 0
    if [ -d /sys/firmware/efi ]; then
        [ -n "$(esp "$disk")" ] || echo "an EFI system partition"
    elif [ "$(lsblk -ndo PTTYPE "/dev/$disk")" = gpt ] && ! has_bios_partition "$disk"; then
        # It is made in front of the first partition where there is room.
        sectors=$(gap "$disk")
        [ "${sectors:-0}" -ge 1024 ] || echo "a BIOS boot partition"
    fi
}

# A start that was cut off may have the larger table already: then no room is left, and what is on it grows, too.
part=$(awaited)
[ "$room" -lt 32768 ] || [ -z "$part" ] ||
    leave "the boot loader's step is tried again, and may need the room behind /dev/$partition for $part"

table_back() {
    sfdisk -q --force --no-reread --no-tell-kernel "/dev/$disk" <"$RW_STATE/before/$disk.grow" >/dev/null 2>&1 ||
        fail "the partition table of /dev/$disk was to be as before, and is not: $RW_STATE/before/$disk.grow has it"
    rm -f "$growing"
    fail "the partition table of /dev/$disk is as before"
}

# Extents that nobody has now stay free.
free_extents() { lvs --noheadings -o vg_free_count "$source" | tr -d ' '; }

if [ "$room" -ge 32768 ]; then
    # A start that only goes on finds no room any more: what is kept stays the table as it was.
    keep_table "$disk" "$RW_STATE/before/$disk.grow" || fail "the partition table of /dev/$disk cannot be kept"
    [ -e "$growing" ] || {
        case $kinds in lvm*) free_extents ;; *) echo 0 ;; esac >"$growing.new" && [ -s "$growing.new" ] &&
            sync "$growing.new" && mv "$growing.new" "$growing" && sync "$growing"
    } || fail "$growing cannot be written"
    if [ "$(lsblk -ndo PTTYPE "/dev/$disk")" = gpt ]; then
        # Its second table lies where the smaller disk ended.
        try sfdisk -q --no-reread --no-tell-kernel --relocate gpt-bak-std "/dev/$disk" || table_back
    fi
    printf ', +\n' >"$RW_HERE/grown"
    try sfdisk -q --no-reread --no-tell-kernel -N "$(cat "$here/$partition/partition")" "/dev/$disk" <"$RW_HERE/grown" ||
        table_back
    partx -u "/dev/$disk" 2>/dev/null || :
    [ "$(end "$partition")" -gt "$before" ] || table_back
fi
case $kinds in
    lvm*)
        try pvresize "/dev/$partition" || fail "/dev/$partition is larger, and its physical volume is not"
        more=$(($(free_extents) - $(cat "$growing")))
        if [ "$more" -gt 0 ]; then
            try lvextend -q -l "+$more" "$source" || fail "/dev/$partition is larger, and its logical volume is not"
        fi
        ;;
esac
kind=$(findmnt -no FSTYPE --target /)
had=$(df -kP / | awk 'NR == 2 { print $2 }')
case $kind in
    ext*) try resize2fs "$source" ;;
    xfs) try xfs_growfs / ;;
    btrfs) try btrfs filesystem resize max / ;;
    *) leave "/dev/$partition is larger, and how $kind grows is not known" ;;
esac || fail "/dev/$partition is larger, and its file system is not"
sync
rm -f "$growing"
say "the root has $((($(df -kP / | awk 'NR == 2 { print $2 }') - had) / 1024)) MiB more"
