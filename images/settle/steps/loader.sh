#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The disk that holds /boot starts by itself: GRUB in its first sectors for a BIOS, EFI/BOOT/BOOTX64.EFI and an entry of
# the firmware's own for UEFI, by what the client itself has installed. What is overwritten is kept before and put back
# if it fails. Where it cannot be done the boot volume stays, and it is said why.
#
# Nothing here makes a disk start whose initramfs is not for this hardware: the boot volume would be passed over.
stays() { leave "the boot volume has to stay attached: $*"; }
# The same where no later start can change it: nobody waits for the room that a partition would have had (grow).
never() { : >"$RW_HERE/no-loader"; stays "$@"; }

if grep -qsx initramfs "$RW_HERE/undone"; then
    none="no initramfs could be made for this hardware"
    [ -n "$RW_INITRD" ] && [ "$RW_GENERATOR" != unknown ] || never "$none"
    stays "$none"
fi
if [ -n "$RW_BY_NAME" ] && [ "$(findmnt -nvo SOURCE --target /)" != "$RW_BY_NAME" ]; then
    never "the guest's boot loader names the root by the old hardware: root=$RW_BY_NAME"
fi
disk=$(disks_below /boot | head -n 1)
[ -n "$disk" ] || stays "the disk of /boot is not known"
[ "$(disks_below /boot | wc -l)" = 1 ] || stays "/boot lies on several disks"
if [ -d /sys/firmware/efi ]; then firmware=uefi; else firmware=bios; fi
[ "$firmware" = "$RW_FIRMWARE" ] || say "the firmware is $firmware, and the target was said to have $RW_FIRMWARE"
table=$(lsblk -ndo PTTYPE "/dev/$disk")
before=$RW_STATE/before/$disk
mkdir -p "$RW_STATE/before" || fail "$RW_STATE/before cannot be made"

# --- the partition table --------------------------------------------------------------------------------------------

table_back() {
    sfdisk -q --force --no-reread --no-tell-kernel "/dev/$disk" <"$before.table" >/dev/null 2>&1 ||
        fail "the partition table of /dev/$disk was to be as before, and is not: $before.table has it"
    rm -f "$before.esp" # another partition may come to lie there
    partx -u "/dev/$disk" 2>/dev/null || :
    fail "the partition table of /dev/$disk is as before; the boot volume has to stay attached"
}

# Whether there are $1 sectors in a row; sets `last`, the last sector of the largest room.
room() {
    sfdisk -qF "/dev/$disk" 2>/dev/null | awk '
        NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i }
        NR > 1 && $column["Sectors"] > most { most = $column["Sectors"]; last = $column["End"] }
        END { print most + 0, last + 0 }' >"$RW_HERE/room"
    read -r most last <"$RW_HERE/room"
    [ "$table" != gpt ] || behind
    [ "$most" -ge "$1" ]
}

# The second table of a GPT lies where the disk ended that it was made for; sfdisk tells of no room behind that.
behind() {
    used=0
    for part in "/sys/class/block/$disk/$disk"*; do
        [ -e "$part/start" ] || continue
        until=$(($(cat "$part/start") + $(cat "$part/size")))
        [ "$until" -le "$used" ] || used=$until
    done
    ends=$(($(cat "/sys/class/block/$disk/size") - 33))
    [ $((ends - used)) -le "$most" ] || most=$((ends - used)) last=$((ends - 1))
}

# All numbers here are of such sectors.
has_common_sectors() {
    [ "$(cat "/sys/class/block/$disk/queue/logical_block_size" 2>/dev/null || echo 512)" = 512 ]
}

# --- BIOS -----------------------------------------------------------------------------------------------------------

grub_in_front() { dd if="/dev/$disk" bs=440 count=1 2>/dev/null | grep -aq GRUB; }

# While this is there GRUB's files for this firmware may be half written. A start that was cut off then finds it.
mark=$before.grub-$firmware
under_way() { [ -e "$mark" ]; }
begin() { : >"$mark" && sync "$mark" "${mark%/*}" || fail "$mark cannot be written"; }
end() { sync && rm -f "$mark"; }

bios() {
    if ! under_way && grub_in_front; then nothing "/dev/$disk has GRUB in its first sector: it starts by itself"; fi
    has grub-install && [ -d /usr/lib/grub/i386-pc ] || stays "the guest has no GRUB for a BIOS (grub-pc-bin)"
    sectors=$(gap "$disk")
    case $table in
        dos) [ "${sectors:-0}" -ge 512 ] || stays "/dev/$disk has no room before its first partition" ;;
        gpt) has_bios_partition "$disk" || new_bios_partition ;;
        *) stays "/dev/$disk has no partition table that GRUB can stand behind" ;;
    esac
    [ "$table" != gpt ] || sectors=1 # GRUB itself lies in its own partition, which nobody else reads
    [ "${sectors:-2048}" -le 2048 ] || sectors=2048
    if ! under_way; then
        dd if="/dev/$disk" of="$before.head" bs=512 count="${sectors:-2048}" conv=fsync 2>/dev/null ||
            fail "the first sectors of /dev/$disk cannot be kept"
    fi
    begin
    if try grub-install --target=i386-pc "/dev/$disk" && grub_in_front && menu; then
        end
        say "/dev/$disk starts by itself on a BIOS"
        exit 0
    fi
    # All but the table that the first sector has in it.
    dd if="$before.head" of="/dev/$disk" bs=512 skip=1 seek=1 conv=fsync,notrunc 2>/dev/null &&
        dd if="$before.head" of="/dev/$disk" bs=440 count=1 conv=fsync,notrunc 2>/dev/null && end ||
        fail "the first sectors of /dev/$disk were to be as before, and are not: $before.head has them"
    fail "the first sectors of /dev/$disk are as before; the boot volume has to stay attached"
}

# GRUB's own partition of a GPT, in the room before the first one, else where there is 1 MiB. The table is written anew
# as it is, but that its first usable sector is the first behind the table itself (many tools begin at 1 MiB), and its last
# one where the disk ends now.
new_bios_partition() {
    has sfdisk || stays "/dev/$disk has no BIOS boot partition, and the guest no sfdisk (fdisk) to make one with"
    has_common_sectors || never "/dev/$disk has no BIOS boot partition, and its sectors are not of 512 bytes"
    keep_table "$disk" "$before.table" || fail "the partition table of /dev/$disk cannot be kept"
    sectors=$(gap "$disk")
    if [ "${sectors:-0}" -ge 1024 ]; then
        start=34 size=$((sectors - 34))
    elif room 4096; then
        start=$(((last + 1 - 2048) / 2048 * 2048)) size=2048
    else
        never "/dev/$disk has no BIOS boot partition and no room for one"
    fi
    {
        sed 's/^first-lba:.*/first-lba: 34/; /^last-lba:/d' "$before.table"
        printf 'start=%s, size=%s, type=21686148-6449-6E6F-744E-656564454649, name="BIOS boot"\n' "$start" "$size"
    } >"$RW_HERE/new"
    try sfdisk -q --force --no-reread --no-tell-kernel "/dev/$disk" <"$RW_HERE/new" || table_back
    partx -u "/dev/$disk" 2>/dev/null || :
    partx -a "/dev/$disk" 2>/dev/null || :
    if has udevadm; then udevadm settle --timeout=30; fi
    say "/dev/$disk has a BIOS boot partition now, at sector $start"
}

# GRUB's menu, where there is none yet.
menu() {
    for config in /boot/grub/grub.cfg /boot/grub2/grub.cfg; do
        [ ! -s "$config" ] || return 0
    done
    if has update-grub; then try update-grub; else try grub2-mkconfig -o /boot/grub2/grub.cfg; fi
}

# --- UEFI -----------------------------------------------------------------------------------------------------------

# Mounts $1 where the client has it, else below /run. Sets `where`.
reach() {
    where=$(findmnt -nro TARGET "$1" | head -n 1)
    [ -z "$where" ] || return 0
    where=$RW_HERE/esp
    mkdir -p "$where" && mount -t vfat "$1" "$where"
}

unsigned="what GRUB makes here is not signed, and this firmware wants it to be"

programs() { [ -d /usr/lib/grub/x86_64-efi ] && has grub-install; }

uefi() {
    partition=$(esp "$disk")
    if [ -z "$partition" ]; then
        [ -z "$RW_SECURE" ] || never "/dev/$disk has no EFI system partition, and $unsigned"
        programs || stays "the guest has no GRUB for UEFI (grub-efi-amd64-bin), and its disk no EFI system partition"
        has mkfs.vfat && has sfdisk ||
            stays "the guest has no mkfs.vfat (dosfstools) or sfdisk (fdisk) to make an EFI system partition with"
        new_esp
    elif is_half_made "$partition"; then
        try mkfs.vfat -F 32 -n ESP "$partition" || fail "$partition, which is new, can have no file system"
        sync && rm -f "$before.esp"
    fi
    reach "$partition" || stays "$partition cannot be mounted"
    own_loader
    fallback=$where/EFI/BOOT/BOOTX64.EFI
    secure
    if [ -s "$fallback" ] && ! under_way && ! lacks_grub; then
        is_there
    elif [ -n "$loader" ]; then
        copied || fail "$partition takes no copy of $(esp_path "$loader"); the boot volume has to stay attached"
        entry
        say "$partition has the guest's own ${loader##*/} as EFI/BOOT/BOOTX64.EFI: /dev/$disk starts by itself"
        exit 0
    fi
    installed
}

# With Secure Boot firmware starts of a guest's own loaders only shim, which others have signed for it. The guest has no
# program to look at signatures with: anything else is taken for one that is refused.
secure() {
    [ -n "$RW_SECURE" ] || return 0
    case $loader in
        '' | *shimx64.efi) ;;
        *) stays "this firmware starts only what is signed for it, and $(esp_path "$loader") is no shim" ;;
    esac
    [ -s "$fallback" ] && [ -z "$loader" ] || return 0
    # Shim carries its name and number in a list (SBAT).
    grep -aq '^shim,[0-9]' "$fallback" ||
        stays "this firmware starts only what is signed for it, and $(esp_path "$fallback") is no shim"
}

# Shim where firmware looks, with nothing beside it that it could start.
lacks_grub() {
    case $loader in
        *shimx64.efi)
            cmp -s "$loader" "$fallback" &&
                ! [ -s "$where/EFI/BOOT/grubx64.efi" ] && ! [ -s "$where/EFI/BOOT/fbx64.efi" ]
            ;;
        *) false ;;
    esac
}

# What firmware finds without being told: it stays as it is. Another system's would start that one, though.
is_there() {
    if [ -z "$loader" ] || cmp -s "$loader" "$fallback" || [ -s "$where/EFI/BOOT/fbx64.efi" ]; then
        entry
        nothing "$partition has EFI/BOOT/BOOTX64.EFI: /dev/$disk starts by itself"
    fi
    entry
    if [ -n "$entered" ]; then
        say "EFI/BOOT/BOOTX64.EFI is not the guest's and stays: the firmware has an entry for $(esp_path "$loader")"
        exit 0
    fi
    stays "$partition has an EFI/BOOT/BOOTX64.EFI that is not the guest's $(esp_path "$loader"), and $no_entry"
}

installed() {
    programs || stays "the guest has no GRUB for UEFI (grub-efi-amd64-bin)"
    [ -z "$RW_SECURE" ] || stays "$unsigned"
    begin
    if try grub-install --target=x86_64-efi --efi-directory="$where" --removable --no-nvram && menu &&
        [ -s "$fallback" ]; then
        end
        say "$partition has GRUB as EFI/BOOT/BOOTX64.EFI: /dev/$disk starts by itself"
        exit 0
    fi
    # Nothing was there before: what is left of the attempt would only be found by firmware and not start.
    rm -f "$fallback" && end
    fail "GRUB could not be installed; the boot volume has to stay attached"
}

# The loader that the client had for a machine which remembered it by name, of several systems' its own: shim with GRUB
# beside it, GRUB alone, or that of systemd. Empty if there is none.
own_loader() {
    vendor=$(sed -n 's/^ID=//p' /etc/os-release 2>/dev/null | tr -d '"' | head -n 1)
    for loader in "$where/EFI/${vendor:-none}"/shimx64.efi "$where/EFI/${vendor:-none}"/grubx64.efi \
        "$where"/EFI/*/shimx64.efi "$where"/EFI/*/grubx64.efi "$where"/EFI/systemd/systemd-bootx64.efi; do
        case $loader in */EFI/BOOT/*) continue ;; esac
        [ ! -s "$loader" ] || return 0
    done
    loader=
}

# What shim starts lies beside it; the copy that firmware looks for comes last, and whole.
copied() {
    mkdir -p "$where/EFI/BOOT" || return 1
    case $loader in
        *shimx64.efi)
            for beside in "${loader%/*}"/grubx64.efi "${loader%/*}"/mm*64.efi; do
                [ -s "$beside" ] || continue
                put "$beside" "$where/EFI/BOOT/${beside##*/}" || return 1
            done
            [ -s "$where/EFI/BOOT/grubx64.efi" ] || return 1
            ;;
    esac
    put "$loader" "$fallback"
}

put() { # from, to: on FAT a name has no second owner, so for a moment there may be none
    cp "$1" "$2.rw" && sync "$2.rw" && cmp -s "$1" "$2.rw" && mv "$2.rw" "$2" && sync "$2" "${2%/*}"
}

esp_path() { printf '%s' "${1#"$where"}" | tr / '\134'; }

# An entry in the firmware's own list, behind those that are there: the boot volume is still tried before it. Where the
# firmware or the guest cannot do it, the copy is enough. Sets `entered`, or `no_entry` to the reason.
entry() {
    entered='' no_entry="the firmware takes no entry"
    [ -n "$loader" ] || return 0
    has efibootmgr || { no_entry="the guest has no efibootmgr" && return 0; }
    efibootmgr -v >"$RW_HERE/entries" 2>/dev/null || { no_entry="the firmware keeps no entries (efivars)" && return 0; }
    uuid=$(lsblk -ndo PARTUUID "$partition")
    path=$(esp_path "$loader")
    order=$(sed -n 's/^BootOrder: *//p' "$RW_HERE/entries")
    number=$(cat "/sys/class/block/${partition##*/}/partition")
    # That of an MBR is the disk's number and the partition's, which an entry has apart.
    [ "$table" != dos ] || uuid="HD\\($number,MBR,0x0*$(printf '%s' "${uuid%-*}" | sed 's/^0*//'),"
    made=$(entry_of "$RW_HERE/entries") an=an
    if [ -z "$made" ]; then
        an="a new"
        try efibootmgr -q --create-only --disk "/dev/$disk" --part "$number" --label "${vendor:-linux}" \
            --loader "$path" && efibootmgr -v >"$RW_HERE/entries.new" && made=$(entry_of "$RW_HERE/entries.new")
    fi
    # One that a cut left out of the order is as good as none.
    case ,$order, in
        *,"${made:-none}",*) entered=1 ;;
        *) [ -n "$made" ] && try efibootmgr -q --bootorder "${order:+$order,}$made" && entered=1 ;;
    esac
    if [ -n "$entered" ]; then
        say "the firmware has $an entry for $path"
    else
        say "$no_entry: $path is not in its list"
    fi
}

# The number of the entry that starts `path` from the partition `uuid`; empty when there is none.
entry_of() { grep '^Boot[0-9A-F]\{4\}' "$1" | grep -iE -- "$uuid" | grep -iF -- "$path" | head -n 1 | cut -c5-8; }

# An EFI system partition at the end of the room that the disk has left. The table as it was is kept, and put back if it
# fails. Sets `partition`.
new_esp() {
    case $table in
        gpt) kind=C12A7328-F81F-11D2-BA4B-00A0C93EC93B ;;
        dos) kind=ef ;;
        *) never "/dev/$disk has no partition table" ;;
    esac
    has_common_sectors || never "/dev/$disk has no EFI system partition, and its sectors are not of 512 bytes"
    # 65 MiB: 64, and what is lost by beginning at a whole one.
    room 133120 || never "/dev/$disk has no EFI system partition and no room for one"
    keep_table "$disk" "$before.table" || fail "the partition table of /dev/$disk cannot be kept"
    old=$(lsblk -nrpo NAME,TYPE "/dev/$disk" | awk '$2 == "part" { print $1 }')
    [ "$table" != gpt ] || try sfdisk -q --no-reread --no-tell-kernel --relocate gpt-bak-std "/dev/$disk" || table_back
    room 133120 || table_back
    start=$(((last + 1 - 131072) / 2048 * 2048))
    new="start=$start, size=131072, type=$kind"
    uuid='' # an MBR has none for a partition
    if [ "$table" = gpt ]; then
        uuid=$(cat /proc/sys/kernel/random/uuid)
        new="$new, uuid=$uuid"
    fi
    echo "$new" >"$RW_HERE/new"
    # An MBR has four, and within one of them more. sfdisk passes over a fifth and says nothing.
    [ "$table" != dos ] || sfdisk --append --no-act --no-reread "/dev/$disk" <"$RW_HERE/new" 2>&1 | grep -q " $start " ||
        never "/dev/$disk has no EFI system partition, and its table takes no further one"
    echo "$start 131072 $uuid" >"$before.esp" && sync "$before.esp" || table_back
    try sfdisk -q --append --no-reread --no-tell-kernel "/dev/$disk" <"$RW_HERE/new" || table_back
    partx -u "/dev/$disk" 2>/dev/null || partx -a "/dev/$disk" 2>/dev/null || :
    if has udevadm; then udevadm settle --timeout=30; fi
    for partition in $(lsblk -nrpo NAME,TYPE "/dev/$disk" | awk '$2 == "part" { print $1 }'); do
        case " $(printf '%s' "$old" | tr '\n' ' ') " in *" $partition "*) partition= ;; *) break ;; esac
    done
    [ -n "$partition" ] && [ -b "$partition" ] || table_back
    try mkfs.vfat -F 32 -n ESP "$partition" || table_back
    sync && rm -f "$before.esp"
    say "$partition is a new EFI system partition"
}

# One of ours, of a start that was cut off before anything was on it that anybody needs.
is_half_made() {
    [ -s "$before.esp" ] && read -r start size uuid <"$before.esp" || return 1
    [ "$start $size" = "$(cat "/sys/class/block/${1##*/}/start") $(cat "/sys/class/block/${1##*/}/size")" ] &&
        { [ -z "$uuid" ] || [ "$uuid" = "$(lsblk -ndo PARTUUID "$1")" ]; } && ! findmnt -nro TARGET "$1" >/dev/null
}

"$firmware"
