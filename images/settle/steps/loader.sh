#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The disk that holds /boot starts by itself: GRUB in its first sectors for a BIOS, EFI/BOOT/BOOTX64.EFI for UEFI, by what
# the client itself has installed. What is overwritten is kept before and put back if it fails. Where it cannot be done
# the boot volume stays, and it is said why.
stays() { leave "the boot volume has to stay attached: $*"; }

disk=$(disks_below /boot | head -n 1)
[ -n "$disk" ] || stays "the disk of /boot is not known"
[ "$(disks_below /boot | wc -l)" = 1 ] || stays "/boot lies on several disks"
if [ -d /sys/firmware/efi ]; then firmware=uefi; else firmware=bios; fi
[ "$firmware" = "$RW_FIRMWARE" ] || say "the firmware is $firmware, and the target was said to have $RW_FIRMWARE"
table=$(lsblk -ndo PTTYPE "/dev/$disk")

# --- BIOS -----------------------------------------------------------------------------------------------------------

grub_in_front() { dd if="/dev/$disk" bs=440 count=1 2>/dev/null | grep -aq GRUB; }

# Sectors before the first partition.
gap() {
    for start in "/sys/class/block/$disk/$disk"*/start; do
        [ ! -e "$start" ] || cat "$start"
    done | sort -n | head -n 1
}

bios() {
    if grub_in_front; then nothing "/dev/$disk has GRUB in its first sector: it starts by itself"; fi
    has grub-install && [ -d /usr/lib/grub/i386-pc ] || stays "the guest has no GRUB for a BIOS (grub-pc-bin)"
    sectors=$(gap)
    case $table in
        dos) [ "${sectors:-0}" -ge 512 ] || stays "/dev/$disk has no room before its first partition" ;;
        gpt)
            lsblk -nro PARTTYPE "/dev/$disk" | grep -qi 21686148-6449-6e6f-744e-656564454649 ||
                stays "/dev/$disk has no BIOS boot partition"
            ;;
        *) stays "/dev/$disk has no partition table that GRUB can stand behind" ;;
    esac
    [ "${sectors:-2048}" -le 2048 ] || sectors=2048
    mkdir -p "$RW_STATE/before" &&
        dd if="/dev/$disk" of="$RW_STATE/before/$disk.head" bs=512 count="${sectors:-2048}" conv=fsync 2>/dev/null ||
        fail "the first sectors of /dev/$disk cannot be kept"
    if try grub-install --target=i386-pc "/dev/$disk" && grub_in_front && menu; then
        say "/dev/$disk starts by itself on a BIOS"
        exit 0
    fi
    dd if="$RW_STATE/before/$disk.head" of="/dev/$disk" bs=512 conv=fsync,notrunc 2>/dev/null
    fail "the first sectors of /dev/$disk are as before; the boot volume has to stay attached"
}

# GRUB's menu, where there is none yet.
menu() {
    for config in /boot/grub/grub.cfg /boot/grub2/grub.cfg; do
        [ ! -s "$config" ] || return 0
    done
    if has update-grub; then try update-grub; else try grub2-mkconfig -o /boot/grub2/grub.cfg; fi
}

# --- UEFI -----------------------------------------------------------------------------------------------------------

esp() {
    lsblk -nrpo NAME,PARTTYPE "/dev/$disk" |
        awk 'tolower($2) == "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" || tolower($2) == "0xef" { print $1; exit }'
}

# Mounts $1 where the client has it, else below /run. Sets `where`.
reach() {
    where=$(findmnt -nro TARGET "$1" | head -n 1)
    [ -z "$where" ] || return 0
    where=$RW_HERE/esp
    mkdir -p "$where" && mount -t vfat "$1" "$where"
}

programs() { [ -d /usr/lib/grub/x86_64-efi ] && has grub-install; }

uefi() {
    partition=$(esp)
    if [ -z "$partition" ]; then
        programs || stays "the guest has no GRUB for UEFI (grub-efi-amd64-bin), and its disk no EFI system partition"
        has mkfs.vfat && has sfdisk ||
            stays "the guest has no mkfs.vfat (dosfstools) or sfdisk (fdisk) to make an EFI system partition with"
        new_esp
    fi
    reach "$partition" || stays "$partition cannot be mounted"
    if [ -s "$where/EFI/BOOT/BOOTX64.EFI" ]; then
        nothing "$partition has EFI/BOOT/BOOTX64.EFI: /dev/$disk starts by itself"
    fi
    if copied; then
        say "$partition has the guest's own ${loader##*/} as EFI/BOOT/BOOTX64.EFI: /dev/$disk starts by itself"
        exit 0
    fi
    programs || stays "the guest has no GRUB for UEFI (grub-efi-amd64-bin)"
    [ -z "$RW_SECURE" ] || stays "what GRUB makes here is not signed, and this firmware wants it to be"
    if try grub-install --target=x86_64-efi --efi-directory="$where" --removable --no-nvram && menu &&
        [ -s "$where/EFI/BOOT/BOOTX64.EFI" ]; then
        sync
        say "$partition has GRUB as EFI/BOOT/BOOTX64.EFI: /dev/$disk starts by itself"
        exit 0
    fi
    # Nothing was there before: what is left of the attempt would only be found by firmware and not start.
    rm -f "$where/EFI/BOOT/BOOTX64.EFI"
    fail "GRUB could not be installed; the boot volume has to stay attached"
}

# The loader that the client had for a machine which remembered it by name: shim with GRUB beside it, or GRUB alone.
copied() {
    for loader in "$where"/EFI/*/shimx64.efi "$where"/EFI/*/grubx64.efi; do
        [ -s "$loader" ] || continue
        mkdir -p "$where/EFI/BOOT" && cp "$loader" "$where/EFI/BOOT/BOOTX64.rw" || return 1
        case $loader in
            *shimx64.efi) cp "${loader%/*}"/grubx64.efi "${loader%/*}"/mm*64.efi "$where/EFI/BOOT/" 2>/dev/null || : ;;
        esac
        sync && mv "$where/EFI/BOOT/BOOTX64.rw" "$where/EFI/BOOT/BOOTX64.EFI" && sync
        return
    done
    return 1
}

# An EFI system partition at the end of the room that the disk has left. The table as it was is kept, and put back if it
# fails. Sets `partition`.
new_esp() {
    case $table in
        gpt) kind=C12A7328-F81F-11D2-BA4B-00A0C93EC93B ;;
        dos) kind=ef ;;
        *) stays "/dev/$disk has no partition table" ;;
    esac
    room || stays "/dev/$disk has no EFI system partition and no room for one"
    mkdir -p "$RW_STATE/before" && sfdisk -d "/dev/$disk" >"$RW_STATE/before/$disk.table" ||
        fail "the partition table of /dev/$disk cannot be kept"
    old=$(lsblk -nrpo NAME,TYPE "/dev/$disk" | awk '$2 == "part" { print $1 }')
    [ "$table" != gpt ] || try sfdisk -q --no-reread --no-tell-kernel --relocate gpt-bak-std "/dev/$disk" || table_back
    room || table_back
    printf 'start=%s, size=131072, type=%s\n' "$(((last + 1 - 131072) / 2048 * 2048))" "$kind" >"$RW_HERE/new"
    try sfdisk -q --append --no-reread --no-tell-kernel "/dev/$disk" <"$RW_HERE/new" || table_back
    partx -u "/dev/$disk" 2>/dev/null || partx -a "/dev/$disk" 2>/dev/null || :
    if has udevadm; then udevadm settle --timeout=30; fi
    for partition in $(lsblk -nrpo NAME,TYPE "/dev/$disk" | awk '$2 == "part" { print $1 }'); do
        case " $(printf '%s' "$old" | tr '\n' ' ') " in *" $partition "*) partition= ;; *) break ;; esac
    done
    [ -n "$partition" ] && [ -b "$partition" ] || table_back
    try mkfs.vfat -F 32 -n ESP "$partition" || table_back
    say "$partition is a new EFI system partition"
}

# Whether there are 65 MiB in a row; sets `last`, the last sector of the largest room.
room() {
    sfdisk -qF "/dev/$disk" 2>/dev/null | awk '
        NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i }
        NR > 1 && $column["Sectors"] > most { most = $column["Sectors"]; last = $column["End"] }
        END { print most + 0, last + 0 }' >"$RW_HERE/room"
    read -r most last <"$RW_HERE/room"
    [ "$most" -ge 133120 ]
}

table_back() {
    sfdisk -q --force --no-reread --no-tell-kernel "/dev/$disk" <"$RW_STATE/before/$disk.table" >/dev/null 2>&1
    partx -u "/dev/$disk" 2>/dev/null || :
    fail "the partition table of /dev/$disk is as before; the boot volume has to stay attached"
}

"$firmware"
