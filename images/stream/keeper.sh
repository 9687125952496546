#!/bin/sh
# Lives beside the client's system, from the initrd until its disks are its own: holds the network and the links to the
# server, fills the local disks, tells the server how far it is. In a mount namespace and root of its own, in memory:
# the initrd's files are gone after the hand-over, and while the root is switched nothing may be read from it.
#
#   keeper enter          make that root and go into it                keeper stay          what it does there
#
# The server serves one boot of one machine at a time, which has to ask first.
#
# A link is a device-mapper multipath with one path, an NBD device. When the connection breaks, the kernel fails the NBD
# device's requests and multipath keeps them; a new connection by a second NBD device takes the place of the path, and
# they go on there. (nbd-client's own -persist answers them with errors, and the kernel's way to connect again is one
# that nbd-client does not know.) Only after RWS_PATIENCE seconds without a server they fail.
PATH=/bin
DM_DISABLE_UDEV=1
MEET=/run/rewind
# Seconds for a link to be made; the server counts on it (appliance/restore/claim.py).
CONNECT=5
export PATH DM_DISABLE_UDEV

x() {
    tool=$1
    shift
    /rw/lib/ld.so --library-path /rw/lib "/rw/bin/$tool" "$@"
}
tell() { echo "rewind: $*" >/dev/console 2>/dev/null; echo "rewind: $*" >/dev/kmsg; }
now() { cut -d. -f1 /proc/uptime; }
doing() { echo "$*" >$MEET/doing; }
lost() {
    echo "$*" >/tmp/lost
    mv /tmp/lost $MEET/lost
}
of_disk() { eval "echo \"\$RWS_$1_$(echo "$2" | tr -c 'A-Za-z0-9\n' _)\""; }

# --- a root of its own ----------------------------------------------------------------------------------------------

enter() {
    mkdir /keep
    mount -t tmpfs -o mode=700,size=64m rewind /keep
    cd /keep || exit
    mkdir bin rw tmp etc dev proc sys run
    cp /bin/busybox bin/
    mkdir rw/bin
    cp /rw/bin/nbd-client /rw/bin/dmsetup rw/bin/
    cp -a /rw/lib /rw/keeper /rw/fill /rw/stream.conf rw/
    [ ! -d /rw/tls ] || cp -a /rw/tls rw/
    for folder in dev proc sys run; do mount --bind "/$folder" "$folder"; done
    # As switch_root does it. What is mounted below the old root goes away with it, in this namespace only.
    mount --move . /
    # The name's first letter tells systemd not to end it before the disks are at rest.
    # shellcheck disable=SC2016 # for the shell inside
    exec chroot . /bin/busybox sh -c '/bin/busybox --install -s /bin; exec -a @/busybox /bin/busybox sh /rw/keeper stay'
}

# --- network --------------------------------------------------------------------------------------------------------

# The card with the address RWS_MAC, else the first one with a link.
find_card() {
    for path in /sys/class/net/*; do
        [ -e "$path/device" ] || continue
        if [ -n "$RWS_MAC" ]; then
            [ "$(cat "$path/address")" != "$RWS_MAC" ] || CARD=${path##*/}
        else
            ip link set dev "${path##*/}" up
            [ -n "$CARD" ] || [ "$(cat "$path/carrier" 2>/dev/null)" != 1 ] || CARD=${path##*/}
        fi
    done
}

# The client's own network set-up knows nothing of our address, and may take it away, or put the card into a bridge: it
# is looked after all the time. It is a second one, that the client never had, in no network of the client's: an address
# that shared one would take the client's with it when it goes.
hold_network() {
    address=''
    while [ ! -e /tmp/end ]; do
        where=$CARD
        [ ! -e "/sys/class/net/$CARD/master" ] || where=$(basename "$(readlink "/sys/class/net/$CARD/master")")
        case $(cat "/sys/class/net/$CARD/flags") in *[13579bdf]) ;; *) ip link set dev "$CARD" up ;; esac
        if [ "$RWS_OWN" != dhcp ]; then
            hold_address "$RWS_OWN" "$RWS_GATEWAY"
        elif [ -s /tmp/lease ]; then
            read -r address gateway </tmp/lease
            hold_address "$address" "$gateway"
        fi
        sleep 2
    done
    kill "$(cat /tmp/lease.pid)" 2>/dev/null
    [ -z "$address" ] || ip addr del "$address/32" dev "$where"
}

# One route for the server alone: those of the client are its own affair.
hold_address() { # address, gateway
    address=$1
    case $(ip -4 -o addr show dev "$where") in *" $1/32 "*) ;; *) ip addr add "$1/32" dev "$where" ;; esac
    ! ip -4 route | grep -q "^$RWS_ADDRESS .*dev $where .*src $1" || return 0
    [ -z "$2" ] || ip route replace "$2/32" dev "$where" src "$1"
    ip route replace "$RWS_ADDRESS/32" ${2:+via "$2"} dev "$where" src "$1"
}

# An identity that is not the client's, or both would be given the same address. No gateway for a server that is near.
lease() {
    cat >/tmp/leased <<EOF
#!/bin/sh
case \$1 in bound | renew) ;; *) exit ;; esac
near() { [ "\$(ipcalc -n "\$ip" "\$subnet")" = "\$(ipcalc -n $RWS_ADDRESS "\$subnet")" ]; }
if near; then echo "\$ip"; else echo "\$ip \${router%% *}"; fi >/tmp/leasing
mv /tmp/leasing /tmp/lease
EOF
    chmod 755 /tmp/leased
    set -- -f -S -t 5 -T 2 -A 5 -C -x "0x3d:00$(echo "$RWS_SESSION" | tr -cd 0-9a-f)" -i "$CARD" -s /tmp/leased
    # shellcheck disable=SC3038 # busybox's shell has it
    exec -a @/busybox /bin/busybox udhcpc "$@"
}

network() {
    doing "no network card ${RWS_MAC:-with a link}"
    CARD='' begun=$(now)
    ip link set dev lo up
    while find_card; [ -z "$CARD" ]; do
        [ $(($(now) - begun)) -lt "$RWS_PATIENCE" ] || lost "there is no network card ${RWS_MAC:-with a link}"
        sleep 0.5
    done
    ip link set dev "$CARD" up
    : >/tmp/lease.pid
    if [ "$RWS_OWN" = dhcp ]; then
        (lease) &
        echo $! >/tmp/lease.pid
    fi
    hold_network &
    holder=$!
}

# --- links ----------------------------------------------------------------------------------------------------------

connect() { # export, device
    set -- -N "$1" "$RWS_ADDRESS" "$RWS_PORT" "/dev/$2" -b 512 -timeout "$RWS_TIMEOUT" -nonetlink -nofork
    [ ! -d /rw/tls ] || set -- "$@" -cacertfile /rw/tls/ca.pem -certfile /rw/tls/client.pem -keyfile /rw/tls/client.key \
        -tlshostname "$RWS_SESSION"
    # shellcheck disable=SC3038 # busybox's shell has it
    exec -a @rewind-link /rw/lib/ld.so --library-path /rw/lib /rw/bin/nbd-client "$@"
}

# Until the link stands or its client has ended. Fails for one that took too long, and has ended it: the kernel says its
# first word again after 1, 3, 7, 15 and 31 s, and a new client says it at once.
until_linked() { # device, process of the client, seconds
    tried=$(now)
    while [ ! -e "/sys/block/$1/pid" ] && kill -0 "$2" 2>/dev/null; do
        if [ $(($(now) - tried)) -ge "$3" ]; then kill "$2" && return 1; fi
        sleep 0.1
    done
}

# A server that needs longer to shake hands is given more time with every try.
longer() { # export
    printf '\nno answer from %s:%s for %s s\n' "$RWS_ADDRESS" "$RWS_PORT" "$grace" >>"/tmp/said.$1"
    [ "$grace" -ge 20 ] || grace=$((grace * 2))
}

# --- one machine at a time -----------------------------------------------------------------------------------------

# This boot, and this machine. The exports that the server gives to it have the boot's name in theirs.
name_boot() {
    BOOT=$(tr -d - </proc/sys/kernel/random/boot_id | cut -c1-16)
    MACHINE=$(cat /sys/class/dmi/id/product_uuid /sys/class/dmi/id/board_serial "/sys/class/net/$CARD/address" 2>/dev/null |
        tr -s ' \n' . | tr -cd 'A-Za-z0-9.:_-' | cut -c1-200)
}

# Asks the server whether this machine may be served (appliance/restore/claim.py), for as long as it takes: one that
# was served before is given a few seconds to be heard of. The connection breaks when the server takes us.
ask_for_leave() {
    since=$(now) told='' LEAVE='' grace=$CONNECT
    while [ -z "$LEAVE" ]; do
        (connect claim nbd0) >/tmp/said.claim 2>&1 &
        client=$!
        until_linked nbd0 $client $grace || longer claim
        while [ -z "$LEAVE" ] && [ -e /sys/block/nbd0/pid ]; do ask; done
        kill $client 2>/dev/null
        wait $client
        [ -n "$LEAVE" ] || without_server claim claim
    done
    [ "$LEAVE" = yes ] || exit
}

ask() {
    doing "the server decides whether this machine is served"
    since=$(now)
    printf 'rewind 1\nboot %s\nmachine %s\nend\n' "$BOOT" "$MACHINE" |
        dd of=/dev/nbd0 bs=4096 conv=sync,notrunc,fsync 2>/dev/null || return
    for _ in 1 2 3 4 5 6 7 8 9 10; do # then once more: somebody else may have asked at the same time
        blockdev --flushbufs /dev/nbd0
        dd if=/dev/nbd0 bs=4096 skip=1 count=1 2>/dev/null | tr -d '\000' >/tmp/answer
        ! grep -qx "granted $BOOT" /tmp/answer || LEAVE=yes
        if grep -q "^refused $BOOT " /tmp/answer; then
            LEAVE=no
            lost "$(sed -n "s/^refused $BOOT //p" /tmp/answer)"
        fi
        if [ -n "$LEAVE" ] || [ ! -e /sys/block/nbd0/pid ]; then return; fi
        sleep 0.5
    done
}

# Whoever asks after us is sent away for it. One that only shows why it does not start must not hold the place of the
# machine that would. The device may have gone since: what is written then would be a file of its name.
give_signs() {
    until [ -e /tmp/end ] || [ -e $MEET/refused ]; do
        [ ! -e /dev/mapper/rewind-src-control ] || echo "$BOOT lives at $(now)" | to_control 1
        sleep 3
    done
}

# Past the page cache: a `sync` of anybody in this machine holds the lock of a device that has dirty pages for as long as
# they are not written, and so does whoever closes it while it reads ahead. The kernel wants that lock to put a new
# connection below the device, without which nothing is written or read.
to_control() { # page; from standard input
    dd of=/dev/mapper/rewind-src-control bs=4096 seek="$1" count=1 oflag=direct conv=sync,notrunc,fsync 2>/dev/null
}

from_control() { # skip=PAGE, count=PAGES
    dd if=/dev/mapper/rewind-src-control bs=4096 iflag=direct "$@" 2>/dev/null
}

# --- links that last -------------------------------------------------------------------------------------------------

# Keeps one link for ever. $2 is the number of the first of its two NBD devices; the one that is not in use is next.
keep_link() { # export, number
    map=rewind-src-$1 next=$2 since=$(now) told='' grace=$CONNECT
    while [ ! -e /tmp/end ]; do
        (connect "$1-$BOOT" "nbd$next") >"/tmp/said.$1" 2>&1 &
        client=$!
        echo $client >"/tmp/client.$1"
        until_linked "nbd$next" $client $grace || longer "$1"
        if [ -e "/sys/block/nbd$next/pid" ] && put_path "$map" "nbd$next"; then
            [ -z "$told" ] || tell "the server is back"
            told='' grace=$CONNECT
            watch_link "$map" "nbd$next" $client
            next=$(($2 + 1 - (next - $2)))
            since=$(now)
        fi
        wait $client
        [ -e /tmp/end ] || without_server "$1" "$map"
    done
}

put_path() { # map, device
    table="0 $(cat "/sys/block/$2/size") multipath 1 queue_if_no_path 0 1 1 round-robin 0 1 1 /dev/$2 1"
    if [ -e "/dev/mapper/$1" ]; then
        x dmsetup load "$1" --table "$table" && x dmsetup resume --noflush --nolockfs "$1"
    else
        x dmsetup create "$1" --table "$table" && blockdev --setra 1024 "/dev/mapper/$1"
    fi
}

# While the connection lasts. A request that the server could not do (its repository does not answer) fails the path
# too: it is tried again.
watch_link() { # map, device, process of the client
    failed=''
    while kill -0 "$3" 2>/dev/null && [ -e "/sys/block/$2/pid" ]; do
        case $(x dmsetup status "$1" 2>/dev/null) in
            *" F "*)
                [ -n "$failed" ] || failed=$(now)
                [ $(($(now) - failed)) -lt "$RWS_PATIENCE" ] || give_up "$1" "the server cannot read or write"
                x dmsetup message "$1" 0 reinstate_path "/dev/$2"
                ;;
            *) failed='' ;;
        esac
        sleep 1
    done
}

without_server() { # export, map
    doing "$(tail -n 1 "/tmp/said.$1")"
    case $(cat "/tmp/said.$1") in
        *"not present"*) why="another machine is served instead of this one, which was silent for too long" ;;
        *) why="no answer from $RWS_ADDRESS:$RWS_PORT: reads and writes wait for at most $RWS_PATIENCE s" ;;
    esac
    # Once, and again when it is another reason: a link breaks before anybody says why.
    if [ -e "/dev/mapper/$2" ] && [ "$why" != "$told" ]; then
        told=$why
        tell "$why"
    fi
    if [ $(($(now) - since)) -ge "$RWS_PATIENCE" ]; then
        if [ -e "/dev/mapper/$2" ]; then give_up "$2" "no server for $RWS_PATIENCE s"; fi
        [ -e $MEET/go ] || lost "$(tail -n 1 "/tmp/said.$1")"
        since=$(now)
    fi
    sleep 1
}

give_up() { # map, why
    tell "$2: what waits for it fails now"
    x dmsetup message "$1" 0 fail_if_no_path
}

links() {
    number=0
    for export in control $RWS_DISKS; do
        keep_link "$export" $number &
        number=$((number + 2))
    done
    for export in control $RWS_DISKS; do
        while [ ! -b "/dev/mapper/rewind-src-$export" ]; do sleep 0.2; done
    done
}

unlink_all() {
    : >/tmp/end
    for export in $RWS_DISKS control; do
        x dmsetup message "rewind-src-$export" 0 fail_if_no_path
        x dmsetup remove --retry "rewind-src-$export" || tell "rewind-src-$export is still in use"
        kill "$(cat "/tmp/client.$export")" 2>/dev/null
    done
}

# --- the way --------------------------------------------------------------------------------------------------------

until_file() { # names of which one has to appear
    while :; do
        for name in "$@"; do [ ! -e "$MEET/$name" ] || return 0; done
        sleep 0.5
    done
}

stay() {
    # shellcheck disable=SC1091 # a file of the image
    . /rw/stream.conf
    # shellcheck disable=SC1091
    . /rw/fill
    # shellcheck disable=SC2034 # fill's
    noting='' shown='' SERVICE='' TOTAL=0
    for disk in $RWS_DISKS; do TOTAL=$((TOTAL + $(of_disk SECTORS "$disk") * 512)); done
    network
    name_boot
    ask_for_leave
    links
    give_signs &
    read_record
    : >$MEET/ready
    until_file go quit error
    if [ -e $MEET/error ]; then put_record "${STATE:-refused}"; fi
    if [ -e $MEET/go ]; then
        if [ "$RWS_MODE" = copy ]; then copy_first; else stream; fi
    fi
    until_file quit
    if [ ! -e $MEET/go ] && [ -e $MEET/plan ]; then end_session; fi
    unlink_all
    wait "$holder" # our address goes before we say that we are gone
    : >$MEET/gone
}

"$1"
