#!/bin/sh
# Changes nothing.
for part in $RW_KEPT; do
    case $part in
        host-name) say "the host name $(head -n 1 /etc/hostname 2>/dev/null) is kept" ;;
        machine-id) say "the machine id $(head -n 1 /etc/machine-id 2>/dev/null) is kept" ;;
        ssh-keys)
            for key in /etc/ssh/ssh_host_*_key.pub; do
                [ -f "$key" ] || continue
                say "the SSH host key $(ssh-keygen -lf "$key" 2>/dev/null | cut -d' ' -f2 || :) (${key##*/}) is kept"
            done
            ;;
        addresses)
            fixed=$(fixed_addresses | tr '\n' ' ')
            if [ -n "$fixed" ]; then say "fixed addresses are kept: ${fixed% }"; else say "there are no fixed addresses to keep"; fi
            own=$(given_macs | tr '\n' ' ')
            [ -z "$own" ] || say "cards keep the hardware addresses that these files give them: ${own% }"
            ;;
    esac
done
