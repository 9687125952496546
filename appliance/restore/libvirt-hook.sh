#!/bin/sh
# rewind-hook 1: installed by Rewind for its home @HOME@; `rewind doctor` looks after it.
#
# While a revert of a domain has not ended, its disk is neither the old state nor the new one, and libvirt does not
# know: it would start the guest on the mixture. Such a domain has a file `fence` in its folder of this home. Nothing
# else is ever refused, and a hook that cannot tell which domain is meant refuses nothing.
if [ "$2" != prepare ] || [ "$3" != begin ]; then
    exit 0
fi
# All of it is read: libvirt writes the definition to us. The domain's own UUID is the first one in it.
uuid=$(sed -n 's:^ *<uuid>\([0-9A-Fa-f-]*\)</uuid>.*:\1:p')
uuid=${uuid%%[!0-9A-Fa-f-]*}
if [ -n "$uuid" ] && [ -e @REVERTS@/"$uuid"/fence ]; then
    printf "a revert of domain '%s' has not ended and its disks are half-way: run \`rewind --home %s resume %s\` first\n" \
        "$1" @HOME@ "$1" >&2
    exit 1
fi
exit 0
