#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The root's partition takes the room behind it, up to the next one or the end of the disk, then so does what is on it.
# After the boot loader's step, which may need some of that room for itself. The table as it was is kept, and put back if
# the kernel does not take the new one.
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
# Less than 16 MiB are the rest of an alignment.
[ "$room" -ge 32768 ] || nothing "there is no room behind /dev/$partition"
mkdir -p "$RW_STATE/before" && sfdisk -d "/dev/$disk" >"$RW_STATE/before/$disk.grow" ||
    fail "the partition table of /dev/$disk cannot be kept"

table_back() {
    sfdisk -q --force --no-reread --no-tell-kernel "/dev/$disk" <"$RW_STATE/before/$disk.grow" >/dev/null 2>&1
    fail "the partition table of /dev/$disk is as before"
}

if [ "$(lsblk -ndo PTTYPE "/dev/$disk")" = gpt ]; then
    # Its second table lies where the smaller disk ended.
    try sfdisk -q --no-reread --no-tell-kernel --relocate gpt-bak-std "/dev/$disk" || table_back
fi
printf ', +\n' >"$RW_HERE/grown"
try sfdisk -q --no-reread --no-tell-kernel -N "$(cat "$here/$partition/partition")" "/dev/$disk" <"$RW_HERE/grown" ||
    table_back
partx -u "/dev/$disk" 2>/dev/null || :
room=$(($(end "$partition") - before))
[ "$room" -gt 0 ] || table_back
case $kinds in
    lvm*)
        try pvresize "/dev/$partition" || fail "/dev/$partition is larger, and its physical volume is not"
        say "/dev/$partition has $((room / 2048)) MiB more: they are free in its volume group"
        exit 0
        ;;
esac
kind=$(findmnt -no FSTYPE --target /)
case $kind in
    ext*) try resize2fs "$source" ;;
    xfs) try xfs_growfs / ;;
    btrfs) try btrfs filesystem resize max / ;;
    *) leave "/dev/$partition is larger, and how $kind grows is not known" ;;
esac || fail "/dev/$partition is larger, and its file system is not"
say "the root has $((room / 2048)) MiB more"
