#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# The host is called RW_NAME: each line of /etc/hosts that has the old name, mail's name, the kernel's, and /etc/hostname
# last: as long as that has the old one, a start that was cut off is done again.
old=$(head -n 1 /etc/hostname 2>/dev/null | tr -d '[:space:]')
[ "$old" != "$RW_NAME" ] || nothing "it is called $RW_NAME already"
if [ -n "$old" ] && [ -f /etc/hosts ]; then
    # Whole words: the short name and the one before a domain.
    awk -v old="${old%%.*}" -v new="$RW_NAME" '
        /^[ \t]*#/ { print; next }
        {
            line = ""
            while (match($0, /[^ \t]+/)) {
                word = substr($0, RSTART, RLENGTH)
                if (word == old) word = new
                else if (index(word, old ".") == 1) word = new substr(word, length(old) + 1)
                line = line substr($0, 1, RSTART - 1) word
                $0 = substr($0, RSTART + RLENGTH)
            }
            print line $0
        }' /etc/hosts >"$RW_HERE/hosts" && replace /etc/hosts <"$RW_HERE/hosts" || fail "/etc/hosts cannot be written"
fi
if [ -n "$old" ] && [ -f /etc/mailname ]; then
    mail=$(head -n 1 /etc/mailname)
    if [ "${mail%%.*}" = "${old%%.*}" ]; then
        printf '%s\n' "$RW_NAME${mail#"${mail%%.*}"}" | replace /etc/mailname || fail "/etc/mailname cannot be written"
    fi
fi
printf '%s\n' "$RW_NAME" | replace /etc/hostname || fail "/etc/hostname cannot be written"
printf '%s' "$RW_NAME" >/proc/sys/kernel/hostname || fail "the kernel does not take the name"
say "it was called ${old:-nothing} and is called $RW_NAME"
