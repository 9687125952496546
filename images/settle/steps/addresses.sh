#!/bin/sh
# Fixed addresses become DHCP, in the files of each program that has some. Files of others are named and left.
changed=

# $1 is a file, the rest is awk and its program; the file is replaced if that makes another one of it.
rewrite() {
    file=$1
    shift
    "$@" "$file" >"$RW_HERE/rewritten" || fail "$file cannot be read"
    cmp -s "$file" "$RW_HERE/rewritten" && return 0
    replace "$file" <"$RW_HERE/rewritten" || fail "$file cannot be written"
    changed="$changed $file"
}

# interfaces(5): the options of a stanza that only `static` has. ifupdown asks by a program of its own.
asks() { has dhclient || has dhcpcd || has dhcpcd5 || has udhcpc || has pump; }
for file in /etc/network/interfaces /etc/network/interfaces.d/*; do
    [ -f "$file" ] || continue
    if ! asks; then
        grep -Eq '^[[:space:]]*iface .*[[:space:]]static' "$file" || continue
        say "$file has fixed addresses, and the guest has no program to ask by DHCP: it is left as it is"
        left=1
        continue
    fi
    # shellcheck disable=SC2016 # awk's own fields
    rewrite "$file" awk '
        $1 == "iface" { fixed = $4 == "static"; if (fixed) { six = $3 == "inet6"; sub(/static[ \t]*$/, six ? "auto" : "dhcp") } }
        $1 ~ /^(auto|allow-.*|mapping|source.*)$/ { fixed = 0 }
        fixed && $1 ~ /^(address|netmask|broadcast|network|gateway|pointopoint)$/ { next }
        { print }'
done
# systemd.network(5)
for file in /etc/systemd/network/*.network; do
    [ -f "$file" ] || continue
    # shellcheck disable=SC2016 # awk's own fields
    grep -Eq '^(Address|Gateway)=' "$file" && rewrite "$file" awk '
        /^\[/ { section = $0; if (section == "[Network]") { print; print "DHCP=yes"; next } }
        section == "[Network]" && /^(Address|Gateway|DHCP)=/ { next }
        section == "[Address]" || section == "[Route]" { next }
        { print }'
done
# nm-settings-keyfile(5)
for file in /etc/NetworkManager/system-connections/*; do
    [ -f "$file" ] || continue
    # shellcheck disable=SC2016 # awk's own fields
    rewrite "$file" awk '
        /^\[/ { address = $0 == "[ipv4]" || $0 == "[ipv6]" }
        address && /^method=manual$/ { print "method=auto"; next }
        address && /^(address|route)[0-9]*=/ { next }
        address && /^gateway=/ { next }
        { print }'
done
for file in /etc/netplan/*.yaml /etc/sysconfig/network-scripts/ifcfg-* /etc/sysconfig/network/ifcfg-*; do
    if [ -f "$file" ] && grep -Eqi '^[[:space:]]*-?[[:space:]]*(addresses|IPADDR[0-9]*)[[:space:]]*[:=]' "$file"; then
        say "$file has fixed addresses and is left as it is"
        left=1
    fi
done
[ -z "$changed" ] || say "by DHCP now:$changed"
[ -n "$changed" ] || [ -z "${left:-}" ] || leave "fixed addresses have to be changed by hand"
[ -n "$changed" ] || nothing "there are no fixed addresses"
