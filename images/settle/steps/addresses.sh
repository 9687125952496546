#!/bin/sh
# shellcheck disable=SC2015 # whatever fails of it, the step has failed
# Fixed addresses become DHCP, in the files of each program that has some, and cards get the hardware addresses that they
# are made with. What the old machine was given by DHCP is forgotten. Files of others are named and left.
changed='' left=''

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
    fixed=1
    if ! asks && grep -Eq '^[[:space:]]*iface .*[[:space:]]static' "$file"; then
        say "$file has fixed addresses, and the guest has no program to ask by DHCP: they are left"
        fixed='' left=1
    fi
    # shellcheck disable=SC2016 # awk's own fields
    rewrite "$file" awk -v may="$fixed" '
        $1 == "iface" { fixed = may && $4 == "static"; if (fixed) { six = $3 == "inet6"; sub(/static[ \t]*$/, six ? "auto" : "dhcp") } }
        $1 ~ /^(auto|allow-.*|mapping|source.*)$/ { fixed = 0 }
        fixed && $1 ~ /^(address|netmask|broadcast|network|gateway|pointopoint)$/ { next }
        $1 == "hwaddress" { next }
        { print }'
done
# systemd.network(5), systemd.link(5)
for file in /etc/systemd/network/*.network /etc/systemd/network/*.link; do
    [ -f "$file" ] || continue
    if networkd_fixed "$file"; then fixed=1; else fixed=0; fi
    # shellcheck disable=SC2016 # awk's own fields
    rewrite "$file" awk -v fixed="$fixed" '
        /^[ \t]*\[/ {
            section = $1
            if (fixed && section == "[Network]") { print; if (!asked++) print "DHCP=yes"; next }
        }
        section == "[Link]" && /^[ \t]*MACAddress[ \t]*=/ { next }
        !fixed { print; next }
        section == "[Network]" && /^[ \t]*(Address|Gateway|DHCP)[ \t]*=/ { next }
        section == "[Address]" || section == "[Route]" { next }
        { print }
        END { if (fixed && !asked) print "[Network]\nDHCP=yes" }'
done
# nm-settings-keyfile(5)
for file in /etc/NetworkManager/system-connections/*; do
    [ -f "$file" ] || continue
    # shellcheck disable=SC2016 # awk's own fields
    rewrite "$file" awk '
        /^\[/ { address = $0 == "[ipv4]" || $0 == "[ipv6]" }
        address && /^method=manual$/ { print "method=auto"; next }
        address && /^(address|addresses|route)[0-9]*=/ { next }
        address && /^gateway=/ { next }
        /^cloned-mac-address=[0-9A-Fa-f][0-9A-Fa-f]:/ { next }
        { print }'
done
# netplan: what a card has at the depth of its own keys, whatever is below them. Whether netplan takes its files is known
# when all are written: one with an original has to be looked at again, also after a start that was cut off.
first=$RW_STATE/before/addresses-$RW_IMAGE
for file in /etc/netplan/*.yaml; do
    [ -f "$file" ] || continue
    [ -e "$first$file" ] || netplan_fixed "$file" || netplan_gives_mac "$file" || continue
    original "$file" || fail "$file cannot be kept"
    cmp -s "$file" "$first$file" || changed="$changed $file"
    # shellcheck disable=SC2016 # awk's own fields
    rewrite "$file" awk '
        function close_card() { if (had && !told) printf "%*sdhcp4: true\n", own, ""; had = 0; told = 0; own = 0 }
        { match($0, /^ */); deep = RLENGTH; item = $0 ~ /^ *- / }
        /^ *(#.*)?$/ { print; next }
        dropping && (deep > at || (item && deep == at)) { next }
        { dropping = 0 }
        deep <= kinds { close_card(); cards = 0 }
        /^ *(ethernets|wifis|bonds|bridges|vlans|modems|tunnels):/ && !cards { kinds = deep; cards = 1; card = 0; print; next }
        cards && !card { card = deep }
        cards && deep == card { close_card(); print; next }
        cards && !own { own = deep }
        cards && deep == own && /^ *(addresses|gateway4|gateway6|routes):/ { had = 1; dropping = 1; at = deep; next }
        cards && deep == own && /^ *macaddress:/ { next }
        cards && deep == own && /^ *dhcp4:/ { sub(/dhcp4:.*/, "dhcp4: true"); told = 1 }
        { print }
        END { close_card() }'
    if netplan_fixed "$file"; then
        say "$file has fixed addresses in a form that is not understood: they are left"
        left=1
    fi
done
case $changed in
    *.yaml*)
        if ! netplan_again; then
            files=$(cd "$first/etc/netplan" && echo *)
            originals_back || fail "netplan does not take $files, which were to be as before, and are not: $first has them"
            netplan_again
            say "netplan does not take $files without fixed addresses: they are left"
            left=1 changed=$(printf '%s' "$changed" | tr ' ' '\n' | grep -v '\.yaml$' | tr '\n' ' ')
        fi
        ;;
esac
rm -rf "$first"
for file in /etc/sysconfig/network-scripts/ifcfg-* /etc/sysconfig/network/ifcfg-*; do
    if [ -f "$file" ] && grep -Eqi '^IPADDR[0-9]*=' "$file"; then
        say "$file has fixed addresses and is left as it is"
        left=1
    fi
done
# What it was given, and as whom it asked.
for lease in /var/lib/dhcp/*.leases /var/lib/dhcpcd/*.lease /var/lib/dhcpcd/duid /var/lib/NetworkManager/*.lease \
    /var/lib/systemd/network/leases/*; do
    [ -f "$lease" ] || continue
    rm -f "$lease" && changed="$changed $lease"
done
[ -z "$changed" ] || say "changed:$changed"
[ -z "$left" ] || leave "fixed addresses have to be changed by hand"
[ -n "$changed" ] || nothing "there are no fixed addresses"
