#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# systemd.link(5): what the image laid into /run is gone with the next start. Before the initramfs is made, which takes
# these files in.
kept=
for link in /run/systemd/network/10-rewind-*.link; do
    [ -f "$link" ] || continue
    own=/etc/systemd/network/${link##*/}
    if [ -e "$own" ] && cmp -s "$link" "$own"; then continue; fi
    mkdir -p "${own%/*}" && replace "$own" <"$link" || fail "$own cannot be written"
    name=${own##*/10-rewind-}
    kept="$kept ${name%.link}"
done
[ -n "$kept" ] || nothing "no card needs a name from us"
say "the names are kept:$kept"
