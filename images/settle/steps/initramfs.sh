#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The initramfs of the running kernel is made anew. One that lacks the driver of the disk's controller is made once more
# with the driver named; if it still does, or nothing was made, the old one is put back. At every moment there is a whole
# initramfs under the name that the boot loader knows: a power cut leaves the old one or the new one there.
release=$(uname -r)
[ "$release" = "$RW_RELEASE" ] || leave "kernel $release runs, and the image was made for $RW_RELEASE"
image=$RW_INITRD
[ -n "$image" ] || leave "the boot loader uses no initramfs"
builtin=/lib/modules/$release/modules.builtin

# Modules that the initramfs must have: of the disks below / and /boot, up to their controllers.
needed() {
    for disk in $(disks_below /) $(disks_below /boot); do drivers_of "$disk"; done | sort -u | while read -r module; do
        grep -qE "/$(loose "$module")\.ko" "$builtin" 2>/dev/null || echo "$module"
    done
}

# A pattern for a module's file: - and _ are the same to the kernel.
loose() { printf '%s' "$1" | sed 's/[-_]/[-_]/g'; }

contents() {
    case $RW_GENERATOR in
        dracut) lsinitrd "$image" ;;
        *) lsinitramfs "$image" ;;
    esac
}

lacking() {
    contents >"$RW_HERE/contents" 2>/dev/null
    [ -s "$RW_HERE/contents" ] || return 1
    for module in $1; do
        grep -qE "/$(loose "$module")\.ko" "$RW_HERE/contents" || printf '%s ' "$module"
    done
}

# dracut copies into the file that is there, and removes it when it fails: it gets another name to write to.
make_anew() {
    case $RW_GENERATOR in
        dracut)
            rm -f "$image.rewind-new"
            if try dracut --force "$image.rewind-new" "$release" && [ -s "$image.rewind-new" ]; then
                sync "$image.rewind-new" && mv "$image.rewind-new" "$image"
            else
                rm -f "$image.rewind-new"
                return 1
            fi
            ;;
        *)
            if [ -e "$image" ]; then try update-initramfs -u -k "$release"; else try update-initramfs -c -k "$release"; fi
            ;;
    esac
}

put_back() {
    if [ -e "$image.rewind-before" ]; then mv "$image.rewind-before" "$image"; else rm -f "$image"; fi
    sync
}

# For this step's own use of the drivers, in the generator's configuration: it holds for later kernels too.
name_drivers() {
    case $RW_GENERATOR in
        dracut) printf 'add_drivers+=" %s "\n' "$*" | replace /etc/dracut.conf.d/rewind.conf ;;
        *)
            { cat /etc/initramfs-tools/modules && printf '%s\n' "$@"; } >"$RW_HERE/modules"
            replace /etc/initramfs-tools/modules <"$RW_HERE/modules"
            ;;
    esac
}

case $RW_GENERATOR in
    dracut) has dracut && has lsinitrd || leave "there is no dracut any more" ;;
    initramfs-tools) has update-initramfs && has lsinitramfs || leave "there is no update-initramfs any more" ;;
    *) leave "the tool that made $image is not known" ;;
esac
modules=$(needed | tr '\n' ' ')
say "the disk needs ${modules:-no module}"
size=$(stat -Lc %s "$image" 2>/dev/null || echo 0)
rm -f "$image.rewind-copy"
free=$(df -kP "${image%/*}" | awk 'NR == 2 { print $4 }')
[ "$free" -gt $((size / 512 + 1024)) ] || leave "${image%/*} has no room for a second initramfs"
# One that is there already is of a start that was cut off: then $image may be a new one that nobody has looked into.
if [ -e "$image" ] && [ ! -e "$image.rewind-before" ]; then
    cp -p "$image" "$image.rewind-copy" && sync "$image.rewind-copy" && mv "$image.rewind-copy" "$image.rewind-before" ||
        fail "$image cannot be copied"
fi
make_anew || { put_back; fail "the old initramfs is back"; }
lacks=$(lacking "$modules") || { put_back; fail "the new one cannot be read; the old initramfs is back"; }
if [ -n "$lacks" ]; then
    say "without ${lacks% }: made once more with it named"
    # shellcheck disable=SC2086 # words
    name_drivers $lacks && make_anew || { put_back; fail "the old initramfs is back"; }
    lacks=$(lacking "$modules") && [ -z "$lacks" ] || { put_back; fail "it lacks ${lacks:-everything}; the old initramfs is back"; }
fi
sync "$image" "${image%/*}"
rm -f "$image.rewind-before"
say "$image has ${modules:-all that it needs}"
