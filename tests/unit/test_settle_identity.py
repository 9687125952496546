"""What of a client's identity becomes new and what is kept, on files that Debian's own programs write and read."""

from __future__ import annotations

import configparser
import json
import re
import stat
import sys
from dataclasses import replace

import pytest
import yaml

from appliance.errors import ConfigError
from images.settle.choice import After, with_steps
from tests.support.settling import Root, debian_files, plan

OLD, NEW = "52:54:00:00:00:01", "52:54:00:00:00:ff"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    with Root(folder) as found:
        yield found


def identified(root, step, **variables):
    return root.run(plan(**variables), {step: {}}, "identity")


# --- the choice -----------------------------------------------------------------------------------------------------


def chosen(**after):
    return After(**after).choice(plan(), "seed")


def test_each_part_is_kept_or_new_by_choice():
    """P6-24: nothing is new unless it is asked for; each part can be kept by name."""
    assert set(chosen()) == set()
    every = ["host-name", "machine-id", "ssh-keys", "addresses"]
    assert chosen(settle=True)["kept"]["parts"] == every
    assert set(every) <= set(chosen(identity="new")) and "kept" not in chosen(identity="new")
    partly = chosen(identity="new", keep=("addresses", "host-name"))
    assert {"machine-id", "ssh-keys"} <= set(partly) and not {"addresses", "host-name"} & set(partly)
    assert partly["kept"]["parts"] == ["host-name", "addresses"]
    named = chosen(host_name="twin")
    assert named["host-name"] == {"name": "twin"} and named["kept"]["parts"] == every[1:]
    assert "cloud-init" in named and set(chosen(grow=True)) == {"grow"}
    with pytest.raises(ConfigError, match="to be kept, and to be 'twin'"):
        chosen(identity="new", keep=("host-name",), host_name="twin")


def test_what_is_kept_is_told(root):
    root.write("/etc/hostname", "ledger\n")
    root.write("/etc/machine-id", "1" * 32 + "\n")
    root.write(
        "/etc/network/interfaces",
        "iface lan0 inet static\n    address 10.0.0.5/24\n    hwaddress ether 52:54:00:1:2:3\n",
    )
    root.inside("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/ssh_host_ed25519_key")
    done = root.run(plan(), chosen(settle=True), "identity")
    report = "\n".join(done.report)
    assert done.code == 0 and "kept: the host name ledger is kept" in report, done
    assert f"kept: the machine id {'1' * 32} is kept" in report
    assert re.search(r"kept: the SSH host key SHA256:\S+ \(ssh_host_ed25519_key.pub\) is kept", report)
    assert "kept: fixed addresses are kept: /etc/network/interfaces" in report
    assert "hardware addresses that these files give them: /etc/network/interfaces" in report


# --- files that are replaced ----------------------------------------------------------------------------------------


def test_the_copy_of_a_file_is_whole(root):
    """P6-18: one that was cut off is made again, as long as the file is the old one."""
    root.write("/etc/hostname", "ledger\n")
    cut = ': >"${!#}"; kill -KILL -1'
    root.program("cp", f'case "$*" in */before/etc/hostname*) {cut} ;; esac; exec /bin/cp "$@"', "bash")
    root.cut(plan(), {"host-name": {"name": "twin"}}, "identity", 1 << 20)
    assert root.read("/etc/hostname") == "ledger\n"
    root.path("/usr/local/sbin/cp").unlink()
    assert root.run(plan(), {"host-name": {"name": "twin"}}, "identity").code == 0
    assert (root.read("/etc/hostname"), root.read("/var/lib/rewind/before/etc/hostname")) == ("twin\n", "ledger\n")


def test_a_link_leads_to_the_file_that_is_replaced(root):
    """P6-18: written through the link it would be half a file for a moment, and no copy of it was kept."""
    root.write("/srv/hostname", "ledger\n", 0o640)
    root.link("/etc/hostname", "/srv/hostname")
    old = root.path("/srv/hostname").stat().st_ino
    assert root.run(plan(), {"host-name": {"name": "twin"}}, "identity").code == 0
    assert root.path("/etc/hostname").is_symlink() and root.read("/srv/hostname") == "twin\n"
    now = root.path("/srv/hostname").stat()
    assert now.st_ino != old and stat.S_IMODE(now.st_mode) == 0o640
    assert root.read("/var/lib/rewind/before/srv/hostname") == "ledger\n"


# --- host name, machine id, keys ------------------------------------------------------------------------------------


def test_host_name(root):
    """P6-24: whole words of the hosts file, nothing else; the old files are kept."""
    root.write("/etc/hostname", "ledger\n")
    hosts = "127.0.0.1\tlocalhost\n127.0.1.1 ledger.example.org   ledger\n# ledger\n10.0.0.1 ledger2 my-ledger\n"
    root.write("/etc/hosts", hosts)
    assert root.run(plan(), {"host-name": {"name": "twin"}}, "identity").code == 0
    assert root.read("/etc/hostname") == "twin\n"
    assert root.read("/etc/hosts") == hosts.replace(
        "127.0.1.1 ledger.example.org   ledger", "127.0.1.1 twin.example.org   twin"
    )
    assert root.read("/var/lib/rewind/before/etc/hosts") == hosts


def test_machine_id(root):
    """P6-24: what the command line said already stays on the disk, for D-Bus too."""
    root.write("/etc/machine-id", "0" * 32 + "\n", 0o444)
    root.write("/var/lib/dbus/machine-id", "0" * 32 + "\n")
    found, settings = with_steps(plan(), After(identity="new"), "seed")
    (word,) = [word for word in found.command_line.split() if word.startswith("systemd.machine_id=")]
    wanted = word.partition("=")[2]
    choice = {"machine-id": {"id": wanted}}
    assert root.run(plan(), choice, "identity").code == 0
    assert root.read("/etc/machine-id") == root.read("/var/lib/dbus/machine-id") == f"{wanted}\n"
    assert stat.S_IMODE(root.path("/etc/machine-id").stat().st_mode) == 0o444
    assert settings.run


def test_machine_id_that_systemd_has_put_there(root):
    """P6-24: systemd commits the id of the command line by itself, and knows nothing of D-Bus's copy."""
    root.write("/etc/machine-id", "1" * 32 + "\n")
    root.write("/var/lib/dbus/machine-id", "0" * 32 + "\n")
    assert root.run(plan(), {"machine-id": {"id": "1" * 32}}, "identity").code == 0
    assert root.read("/var/lib/dbus/machine-id") == "1" * 32 + "\n"


def test_ssh_keys(root):
    """P6-24: made by the client; private parts are in no image, and the old ones in no copy."""
    for kind in ("ed25519", "rsa", "dsa"):
        root.write(f"/etc/ssh/ssh_host_{kind}_key", f"old {kind}", 0o600)
        root.write(f"/etc/ssh/ssh_host_{kind}_key.pub", f"old {kind}")
    root.write("/etc/ssh/ssh_host_rsa_key-cert.pub", "signed")
    done = root.run(plan(), {"ssh-keys": {}}, "identity")
    assert done.code == 0, done
    for kind in ("ed25519", "rsa"):
        assert "PRIVATE KEY" in root.read(f"/etc/ssh/ssh_host_{kind}_key")
        assert stat.S_IMODE(root.path(f"/etc/ssh/ssh_host_{kind}_key").stat().st_mode) == 0o600
        assert root.read(f"/etc/ssh/ssh_host_{kind}_key.pub").startswith("ssh-")
    assert not root.path("/etc/ssh/ssh_host_rsa_key-cert.pub").exists()
    assert not list(root.path("/var/lib/rewind").rglob("*key*"))


def test_addresses(root):
    """P6-24: fixed addresses become DHCP, and the rest of each file stays as it is."""
    root.program("dhclient", "")
    root.write("/etc/network/interfaces", (
        "auto lo ens3\niface lo inet loopback\n# static\niface ens3 inet static\n    address 10.0.2.15/24\n"
        "    gateway 10.0.2.2\n    mtu 1400\niface ens4 inet dhcp\n"
    ))  # fmt: skip
    root.write("/etc/systemd/network/10-lan.network", (
        "[Match]\nName=lan0\n\n[Network]\nAddress=10.1.1.1/24\nGateway=10.1.1.254\nDNS=9.9.9.9\n\n[Route]\nGateway=1.1.1.1\n"
    ))  # fmt: skip
    root.write("/etc/NetworkManager/system-connections/eth.nmconnection", (
        "[connection]\nid=eth\n\n[ipv4]\naddress1=10.2.2.2/24,10.2.2.1\ndns=9.9.9.9;\nmethod=manual\n\n[ipv6]\nmethod=auto\n"
    ), 0o600)  # fmt: skip
    done = root.run(plan(), {"addresses": {}}, "identity")
    assert done.code == 0, done
    assert root.read("/etc/network/interfaces") == (
        "auto lo ens3\niface lo inet loopback\n# static\niface ens3 inet dhcp\n    mtu 1400\niface ens4 inet dhcp\n"
    )
    assert root.read("/etc/systemd/network/10-lan.network") == (
        "[Match]\nName=lan0\n\n[Network]\nDHCP=yes\nDNS=9.9.9.9\n\n"
    )
    path = "/etc/NetworkManager/system-connections/eth.nmconnection"
    assert root.read(path) == ("[connection]\nid=eth\n\n[ipv4]\ndns=9.9.9.9;\nmethod=auto\n\n[ipv6]\nmethod=auto\n")
    assert stat.S_IMODE(root.path(path).stat().st_mode) == 0o600


def test_addresses_stay_where_nobody_could_ask_for_others(root):
    """A machine with the old address is of more use than one without any."""
    text = "auto ens3\niface ens3 inet static\n    address 10.0.2.15/24\n"
    root.write("/etc/network/interfaces", text)
    root.hide("dhclient", "dhcpcd", "dhcpcd5", "udhcpc", "pump")
    done = root.run(plan(), {"addresses": {}}, "identity")
    assert done.code == 0 and "addresses: left as it was" in done.report, done
    assert root.read("/etc/network/interfaces") == text


# --- netplan, by its own generator ----------------------------------------------------------------------------------

# As cloud-init writes it.
NETPLAN = f"""# This file is generated from information provided by the datasource.
network:
    ethernets:
        lan0:
            addresses:
            - 10.0.0.5/24
            - 2001:db8::5/64
            dhcp4: false
            match:
                macaddress: {OLD}
            nameservers:
                addresses:
                - 10.0.0.2
                search: [example.org]
            routes:
            -   to: default
                via: 10.0.0.1
            set-name: lan0
        lan1:
            dhcp4: true
    version: 2
"""
# As people write it, with what a person may do.
BY_HAND = """network:
  version: 2
  renderer: networkd

  ethernets:
    lan0:
      addresses: [10.0.0.5/24, "10.0.0.6/24"]
      routes:
        - to: default
          via: 10.0.0.1   # the way out
      macaddress: 02:00:00:00:00:99
      mtu: 1400
    lan1: {dhcp4: true}
  bridges:
    br0:
      interfaces: [lan1]
      addresses:
        - 10.1.0.1/24
"""


@pytest.fixture
def netplan(root):
    """Debian's netplan; its generator writes networkd's files below /run."""
    files = debian_files()
    for name in files.rglob("libnetplan.so*"):
        root.take(files, f"/{name.relative_to(files)}")
    root.take(files, "/usr/libexec/netplan/generate")
    root.program("netplan", '[ "$1" = generate ] && exec /usr/libexec/netplan/generate')

    def generated(name="10-netplan-lan0.network"):
        return root.read(f"/run/systemd/network/{name}")

    root.generated = generated
    return root


def test_netplan_asks_by_dhcp(netplan):
    """P6-24: addresses and routes go, the name servers and everything else stay; its generator takes the new file and
    has run again, since networkd reads what it makes."""
    netplan.write("/etc/netplan/50-cloud-init.yaml", NETPLAN, 0o600)
    done = identified(netplan, "addresses")
    assert done.code == 0 and "addresses: changed: /etc/netplan/50-cloud-init.yaml" in done.report, done
    before, after = yaml.safe_load(NETPLAN), yaml.safe_load(netplan.read("/etc/netplan/50-cloud-init.yaml"))
    card = before["network"]["ethernets"]["lan0"]
    card.pop("addresses"), card.pop("routes")
    card["dhcp4"] = True
    assert after == before
    assert "DHCP=ipv4" in netplan.generated() and "\nAddress=" not in netplan.generated()
    assert "DNS=10.0.0.2" in netplan.generated()
    assert stat.S_IMODE(netplan.path("/etc/netplan/50-cloud-init.yaml").stat().st_mode) == 0o600


def test_netplan_by_hand(netplan):
    netplan.write("/etc/netplan/01.yaml", BY_HAND, 0o600)
    assert identified(netplan, "addresses").code == 0
    after = yaml.safe_load(netplan.read("/etc/netplan/01.yaml"))["network"]
    assert after["ethernets"] == {"lan0": {"mtu": 1400, "dhcp4": True}, "lan1": {"dhcp4": True}}
    assert after["bridges"] == {"br0": {"interfaces": ["lan1"], "dhcp4": True}}
    assert "MACAddress" not in netplan.generated()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("network: {ethernets: {lan0: {addresses: [10.0.0.5/24]}}}\n", "in a form that is not understood"),
        (
            "network:\n  ethernets:\n    lan0:\n      addresses: [10.0.0.5/24,\n      10.0.0.6/24]\n",
            "netplan does not take 01.yaml",
        ),
    ],
)
def test_netplan_that_is_not_understood_stays_as_it_was(netplan, text, said):
    """P6-24: a machine with the old address is of more use than one without any."""
    netplan.write("/etc/netplan/01.yaml", text, 0o600)
    done = identified(netplan, "addresses")
    assert netplan.read("/etc/netplan/01.yaml") == text, done
    assert said in "\n".join(done.report) and "addresses: left as it was" in done.report


@pytest.mark.parametrize("takes", [True, False])
def test_netplan_is_asked_again_after_a_start_that_was_cut_off(root, takes):
    """P6-24: its files are written by then, and the next start has to know what they were."""
    text = "network:\n  ethernets:\n    lan0:\n      addresses: [10.0.0.5/24]\n"
    root.write("/etc/netplan/01.yaml", text, 0o600)
    root.program("netplan", "kill -KILL -1", "bash")
    root.cut(plan(), {"addresses": {}}, "identity", 1 << 20)
    assert root.read("/etc/netplan/01.yaml") != text
    root.program("netplan", "" if takes else "grep -q addresses /etc/netplan/01.yaml")
    done = identified(root, "addresses")
    assert ("addresses: changed: /etc/netplan/01.yaml" in done.report) == takes, done
    assert f"addresses: {'done' if takes else 'left as it was'}" in done.report
    assert (root.read("/etc/netplan/01.yaml") == text) != takes
    assert not list(root.path("/var/lib/rewind/before").glob("addresses-*"))


def test_what_is_put_back_of_netplan_knows_the_new_card(root):
    """P6-15, P6-24: `cards` could not do it in the start in which `addresses` was cut off, and then it can."""
    text = f"network:\n  ethernets:\n    lan0:\n      match: {{macaddress: {OLD}}}\n      addresses: [10.0.0.5/24]\n"
    made = plan(client=replace(plan().client, nics={"lan0": OLD}), rename={NEW: "lan0"})
    root.write("/etc/netplan/01.yaml", text, 0o600)
    root.program("netplan", "grep -q addresses /etc/netplan/01.yaml && exit 1; kill -KILL -1", "bash")
    root.cut(made, {"cards": {}, "addresses": {}}, "identity", 1 << 20)
    assert OLD in root.read("/etc/netplan/01.yaml") and "addresses" not in root.read("/etc/netplan/01.yaml")
    root.program("netplan", "grep -q addresses /etc/netplan/01.yaml")
    done = root.run(made, {"cards": {}, "addresses": {}}, "identity")
    assert "cards: done" in done.report and "addresses: left as it was" in done.report, done
    assert root.read("/etc/netplan/01.yaml") == text.replace(OLD, NEW)


def test_netplan_finds_the_new_card(netplan):
    """P6-15, P6-24: a card that is found by its address is another one here. What gives a card an address stays."""
    netplan.write("/etc/netplan/50-cloud-init.yaml", NETPLAN, 0o600)
    netplan.write("/etc/netplan/60.yaml", f"network: {{ethernets: {{lan1: {{macaddress: '{OLD}'}}}}}}\n", 0o600)
    client = replace(plan().client, nics={"lan0": OLD, "lan1": ""})
    done = identified(netplan, "cards", client=client, rename={NEW: "lan0", "52:54:00:00:00:ee": "lan1"})
    assert done.code == 0 and "cards: these find the new cards: /etc/netplan/50-cloud-init.yaml" in done.report, done
    assert netplan.read("/etc/netplan/50-cloud-init.yaml") == NETPLAN.replace(OLD, NEW)
    assert OLD in netplan.read("/etc/netplan/60.yaml")
    assert f"PermanentMACAddress={NEW}" in netplan.generated() and "Address=10.0.0.5/24" in netplan.generated()


# --- the others -----------------------------------------------------------------------------------------------------

LINK = f"[Match]\nMACAddress={OLD}\n\n[Link]\nName=lan0\nMACAddress=02:00:00:00:00:99\n"
NETWORK = f"[Match]\nPermanentMACAddress={OLD.upper()}\n\n[Network]\nDHCP=no\nDNS=10.0.0.2\nAddress=10.0.0.5/24\n"
KEYFILE = f"""[connection]
id=wired
type=ethernet

[ethernet]
mac-address={OLD.upper()}
cloned-mac-address=02:00:00:00:00:99

[ipv4]
method=manual
address1=10.0.0.5/24,10.0.0.1
dns=10.0.0.2;
"""
UDEV = f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{OLD}", NAME="lan0"\n'
FILES = {
    "/etc/systemd/network/10-lan.link": LINK, "/etc/systemd/network/10-lan.network": NETWORK,
    "/etc/NetworkManager/system-connections/wired.nmconnection": KEYFILE,
    "/etc/udev/rules.d/70-persistent-net.rules": UDEV,
}  # fmt: skip


def test_each_program_finds_the_new_card(root):
    """P6-24: networkd, NetworkManager, udev; only what finds a card, not what gives it an address."""
    for path, text in FILES.items():
        root.write(path, text, 0o600)
    client = replace(plan().client, nics={"lan0": OLD})
    done = identified(root, "cards", client=client, rename={NEW: "lan0"})
    assert done.code == 0, done
    for path, text in FILES.items():
        assert root.read(path) == re.sub(OLD, NEW, text, flags=re.I), path
        assert stat.S_IMODE(root.path(path).stat().st_mode) == 0o600
    again = root.run(plan(client=client, rename={NEW: "lan0"}), {"cards": {}}, "identity", seed="other")
    assert "cards: nothing to do" in again.report


def test_networkds_files_with_blanks(root):
    """P6-24: systemd takes them before a key and around `=`; an address has a section of its own, too."""
    root.write("/etc/systemd/network/a.network", "[Match]\nName=a\n[Network]\n Address = 10.0.0.5/24\nDNS = 10.0.0.2\n")
    root.write("/etc/systemd/network/b.network", "[Match]\nName=b\n\n[Address]\nAddress = 10.0.0.6/24\n")
    root.write("/etc/systemd/network/c.link", "[Match]\nName=c\n [Link]\n MACAddress = 02:00:00:00:00:99\n")
    kept = root.run(plan(), {"kept": {"parts": ["addresses"]}}, "identity", seed="kept")
    assert "a.network /etc/systemd/network/b.network" in kept.report[0] and "c.link" in kept.report[1], kept
    done = identified(root, "addresses")
    assert done.code == 0 and "addresses: done" in done.report, done
    assert root.read("/etc/systemd/network/a.network") == (
        "[Match]\nName=a\n[Network]\nDHCP=yes\nDNS = 10.0.0.2\n"
    )
    assert root.read("/etc/systemd/network/b.network") == "[Match]\nName=b\n\n[Network]\nDHCP=yes\n"
    assert root.read("/etc/systemd/network/c.link") == "[Match]\nName=c\n [Link]\n"


def test_cards_that_change_places(root):
    """P6-24: what is new for one card is the old address of another."""
    macs = [f"52:54:00:00:00:0{number}" for number in range(5)]
    root.write("/etc/systemd/network/a.link", "".join(f"[Match]\nMACAddress={one} {macs[0]}\n" for one in macs[:4]))
    client = replace(plan().client, nics={f"lan{number}": one for number, one in enumerate(macs[:4])})
    done = identified(root, "cards", client=client, rename={one: f"lan{number}" for number, one in enumerate(macs[1:])})
    assert done.code == 0, done
    assert root.read("/etc/systemd/network/a.link") == "".join(
        f"[Match]\nMACAddress={one} {macs[1]}\n" for one in macs[1:]
    )


THIRD = "52:54:00:00:00:aa"


def exchanged(root, at=0):
    """Two cards of which the second has what was the first one's address; killed at a command, if `at` is given."""
    client = replace(plan().client, nics={"lan0": OLD, "lan1": NEW})
    made = plan(client=client, rename={NEW: "lan0", THIRD: "lan1"})
    return root.cut(made, {"cards": {}}, "identity", at) if at else root.run(made, {"cards": {}}, "identity")


@pytest.mark.parametrize("program", ["mv", "sync"])
def test_a_card_is_exchanged_once_whatever_is_cut_off(root, program):
    """P6-24: before the step is known to be done, and between one file and the next."""
    files = {f"/etc/systemd/network/{name}.link": f"[Match]\nMACAddress={OLD}\n" for name in "ab"}
    for path, text in files.items():
        root.write(path, text)
    when = {"mv": "*identity-*.steps", "sync": "*/.b.link.rewind-new"}[program]
    root.program(program, f'case "$*" in {when}) kill -KILL $PPID ;; esac; exec /bin/{program} "$@"', "bash")
    exchanged(root, 1 << 20)
    assert NEW in root.read("/etc/systemd/network/a.link")
    root.program(program, f'[ {program} = sync ] || exec /bin/{program} "$@"')
    done = exchanged(root)
    assert f"cards: these find the new cards: {' '.join(files)}" in done.report, done
    for path, text in files.items():
        assert root.read(path) == text.replace(OLD, NEW), done


def test_files_that_netplan_does_not_take_are_as_before(root):
    """P6-24: in each start anew, also when another step has changed them in between."""
    text = f"network:\n  ethernets:\n    lan0:\n      match:\n        macaddress: '{OLD}'\n"
    root.write("/etc/netplan/a.yaml", text)
    root.program("netplan", f"! grep -q {NEW} /etc/netplan/a.yaml || {{ echo no >&2; exit 1; }}")
    for now in (text, text + "      dhcp4: true\n"):
        root.write("/etc/netplan/a.yaml", now)
        done = exchanged(root)
        assert done.code == 1 and "netplan does not take its files; the files are as before" in done.report[1], done
        assert root.read("/etc/netplan/a.yaml") == now
    root.program("netplan", "")
    assert exchanged(root).code == 0 and root.read("/etc/netplan/a.yaml") == now.replace(OLD, NEW)


def test_addresses_that_were_left_are_somebodys_to_change(root):
    """P6-24: whatever they are by the next start, they stay."""
    text = "iface ens3 inet static\n  address 10.0.0.2/24\n"
    root.write("/etc/network/interfaces", text)
    root.hide("dhclient", "dhcpcd", "dhcpcd5", "udhcpc", "pump")
    assert "addresses: left as it was" in root.run(plan(), {"addresses": {}}, "identity").report
    root.program("dhclient", "")
    again = root.run(plan(), {"addresses": {}}, "identity")
    assert "done before" in again.report[0] and root.read("/etc/network/interfaces") == text, again


def test_networkd_and_networkmanager_ask_and_have_their_own_hardware(root):
    """P6-24: fixed addresses go, and those that another machine's cards were given."""
    for path, text in FILES.items():
        root.write(path, text, 0o600)
    root.write("/var/lib/dhcp/dhclient.lan0.leases", "lease {}")
    done = identified(root, "addresses")
    assert done.code == 0, done
    network = root.read("/etc/systemd/network/10-lan.network")
    assert "DHCP=yes" in network and "Address=10" not in network and "DNS=10.0.0.2" in network
    assert root.read("/etc/systemd/network/10-lan.link") == LINK.replace("MACAddress=02:00:00:00:00:99\n", "")
    keyfile = configparser.ConfigParser()
    keyfile.read_string(root.read("/etc/NetworkManager/system-connections/wired.nmconnection"))
    assert dict(keyfile["ipv4"]) == {"method": "auto", "dns": "10.0.0.2;"}
    assert dict(keyfile["ethernet"]) == {"mac-address": OLD.upper()}
    assert not root.path("/var/lib/dhcp/dhclient.lan0.leases").exists() or stat.S_ISCHR(
        root.path("/var/lib/dhcp/dhclient.lan0.leases").lstat().st_mode
    )


INTERFACES = """# The loopback network interface
source /etc/network/interfaces.d/*
auto lo
iface lo inet loopback

allow-hotplug lan0
iface lan0 inet static
    address 10.0.0.5/24
    gateway 10.0.0.1
    dns-nameservers 10.0.0.2
    hwaddress ether 02:00:00:00:00:99
iface lan0 inet6 static
    address 2001:db8::5/64
"""


def test_ifupdown_reads_what_it_is_given(root):
    """P6-24: by ifupdown's own parser."""
    folder = "/sbin" if (debian_files() / "sbin/ifup").exists() else "/usr/sbin"
    root.take(debian_files(), f"{folder}/ifup", f"{folder}/ifquery")
    root.write("/etc/network/interfaces", INTERFACES)
    root.program("dhclient", "")
    assert "10.0.0.5" in root.inside("ifquery", "lan0")
    done = identified(root, "addresses")
    assert done.code == 0, done
    after = root.inside("ifquery", "lan0")
    assert "dns-nameservers: 10.0.0.2" in after and not re.search("^(address|gateway|hwaddress)", after, re.M)
    assert root.read("/etc/network/interfaces").count("inet dhcp") == 1
    assert root.read("/etc/network/interfaces").count("inet6 auto") == 1


# --- cloud-init, by its own program ---------------------------------------------------------------------------------

_SETTINGS = """
import json, sys
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from cloudinit import util
found = util.read_conf_with_confd("/etc/cloud/cloud.cfg")
names = ("manual_cache_clean", "preserve_hostname", "manage_etc_hosts", "ssh_deletekeys", "network")
print(json.dumps({name: found.get(name) for name in names}))
"""


@pytest.mark.timeout(60)
def test_cloud_init_takes_nothing_back(root):
    """P6-24: its own parser reads our settings last, and its own detector keeps the instance that it has."""
    modules = [f"/usr/lib/python3/dist-packages/{name}" for name in ("cloudinit", "jinja2", "markupsafe")]
    root.take(debian_files(), "/etc/cloud", "/usr/lib/cloud-init/ds-identify", *modules)
    root.write("/etc/cloud/cloud.cfg.d/99-mine.cfg", "preserve_hostname: false\nmanage_etc_hosts: true\n")
    root.write("/var/lib/cloud/instance/user-data.txt", "")
    done = identified(root, "cloud-init")
    assert done.code == 0 and "cloud-init: done" in done.report, done
    found = json.loads(root.inside(sys.executable, "-c", _SETTINGS))
    assert found == {
        "manual_cache_clean": True, "preserve_hostname": True, "manage_etc_hosts": False, "ssh_deletekeys": False,
        "network": {"config": "disabled"},
    }  # fmt: skip
    root.inside("sh", "-c", "DI_LOG=/run/ds.log sh /usr/lib/cloud-init/ds-identify --force || :")
    assert "manual_cache_clean" in root.read("/run/cloud-init/cloud.cfg")


def test_without_cloud_init_there_is_nothing_to_do(root):
    assert "cloud-init: nothing to do" in identified(root, "cloud-init").report
