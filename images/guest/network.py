"""Names of network interfaces that a client's configuration speaks of, with MAC addresses where it says them.

    ifupdown        /etc/network/interfaces, its `source` lines
    netplan         /etc/netplan/*.yaml
    networkd        /etc/systemd/network/*.network and .link
    NetworkManager  /etc/NetworkManager/system-connections/*.nmconnection
    ifcfg           /etc/sysconfig/network-scripts/ifcfg-*
    udev            /etc/udev/rules.d/70-persistent-net.rules

Only cards count: bridges, bonds, VLANs and the like are made by software, under any hardware. Patterns are no names.
"""

from __future__ import annotations

import configparser
import fnmatch
import re
from collections.abc import Callable, Iterator

import yaml

from appliance.errors import GuestUnreadable
from images.guest.texts import fields, lines, listed, printable, text
from images.tree import Tree

__all__ = ["interfaces"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_SOFTWARE = re.compile(r"lo|(br|bond|dummy|tun|tap|wg|veth|virbr|docker|vlan|team|ifb|sit|vxlan)[0-9-].*")
_SOFTWARE_OPTIONS = ("bridge_ports", "bridge-ports", "bond-slaves", "bond_slaves", "vlan-raw-device", "vlan_raw_device")
_MOST = 256

_Found = Iterator[tuple[str, str]]


def interfaces(tree: Tree, warnings: list[str]) -> dict[str, str]:
    """Name → MAC address ("" when it is not said). What cannot be parsed is told in `warnings`."""
    found: dict[str, str] = {}
    for paths, parse in _sources(tree):
        for path in paths:
            try:
                for name, mac in parse(text(tree, path)):
                    _add(found, name, mac)
            except (ValueError, GuestUnreadable, yaml.YAMLError, configparser.Error, RecursionError) as error:
                reason = printable(str(error).replace("\n", " "))
                warnings.append(f"{printable(path)} is not understood, its interfaces are not known: {reason}")
    return dict(sorted(found.items())[:_MOST])


def _sources(tree: Tree) -> Iterator[tuple[list[str], Callable[[str], _Found]]]:
    yield _ifupdown_files(tree), _ifupdown
    yield listed(tree, "/etc/netplan", ".yaml"), _netplan
    yield listed(tree, "/etc/systemd/network", ".link"), _link
    yield listed(tree, "/etc/systemd/network", ".network"), _networkd
    yield listed(tree, "/etc/NetworkManager/system-connections", ".nmconnection"), _keyfile
    scripts = listed(tree, "/etc/sysconfig/network-scripts", "")
    yield [path for path in scripts if "/ifcfg-" in path], _ifcfg
    yield ["/etc/udev/rules.d/70-persistent-net.rules"], _udev


def _add(found: dict[str, str], name: str, mac: str) -> None:
    mac = mac.strip().strip("\"'").lower().replace("-", ":")
    mac = mac if _MAC.fullmatch(mac) else ""
    if _NAME.fullmatch(name) and not _SOFTWARE.fullmatch(name) and "." not in name:
        found[name] = mac or found.get(name, "")


# --- ifupdown ---


def _ifupdown_files(tree: Tree) -> list[str]:
    """The file and those it names, one step deep."""
    main = "/etc/network/interfaces"
    try:
        content = text(tree, main)
    except GuestUnreadable:
        return [main]  # it is told when it is read
    found = [main]
    for line in lines(content):
        word, _, pattern = line.partition(" ")
        pattern = pattern.strip()
        if word in ("source", "source-directory") and pattern:
            pattern = f"{pattern.rstrip('/')}/*" if word == "source-directory" else pattern
            pattern = pattern if pattern.startswith("/") else f"/etc/network/{pattern}"
            folder, _, names = pattern.rpartition("/")
            found += [one for one in listed(tree, folder, "") if fnmatch.fnmatchcase(one.rpartition("/")[2], names)]
    return found[:_MOST]


def _ifupdown(content: str) -> _Found:
    current, software = "", set()
    found: dict[str, str] = {}
    for line in lines(content.replace("\\\n", " ")):
        word, *rest = line.split()
        if word == "iface" and rest:
            current = rest[0]
            found.setdefault(current, "")
        elif word == "auto" or word.startswith("allow-"):
            found.update({name: found.get(name, "") for name in rest if "/" not in name})
        elif word in _SOFTWARE_OPTIONS:
            software.add(current)
            found.update({name: found.get(name, "") for name in rest if name not in ("none", "all", "regex")})
        elif word == "hwaddress" and rest:
            found[current] = rest[-1]
    yield from ((name.partition(":")[0], mac) for name, mac in found.items() if name not in software)


# --- the others ---


def _netplan(content: str) -> _Found:
    network = _mapping(_mapping(yaml.safe_load(content)).get("network"))
    for kind in ("ethernets", "wifis"):
        for name, settings in _mapping(network.get(kind)).items():
            match = _mapping(_mapping(settings).get("match"))
            real = _mapping(settings).get("set-name") or match.get("name") or name
            if "name" in match or not match or "set-name" in _mapping(settings):
                yield str(real), str(match.get("macaddress", ""))


def _link(content: str) -> _Found:
    found = _sections(content)
    mac = found.get("match", {}).get("macaddress") or found.get("match", {}).get("permanentmacaddress", "")
    yield found.get("link", {}).get("name", ""), mac


def _networkd(content: str) -> _Found:
    match = _sections(content).get("match", {})
    for name in match.get("name", "").split():
        yield name, match.get("macaddress", "")


def _keyfile(content: str) -> _Found:
    found = _sections(content)
    connection = found.get("connection", {})
    if connection.get("type", "ethernet") in ("ethernet", "802-3-ethernet"):
        cable = found.get("ethernet", found.get("802-3-ethernet", {}))
        yield connection.get("interface-name", ""), cable.get("mac-address", "")


def _ifcfg(content: str) -> _Found:
    found = fields(content)
    if found.get("TYPE", "Ethernet") == "Ethernet":
        yield found.get("DEVICE", ""), found.get("HWADDR", "")


def _udev(content: str) -> _Found:
    for line in lines(content):
        name = re.search(r'NAME="([^"]{1,15})"', line)
        mac = re.search(r'ATTR\{address\}=="([^"]{17})"', line)
        if name and mac:
            yield name[1], mac[1]


def _sections(content: str) -> dict[str, dict[str, str]]:
    """A file of `[Section]` and `key=value`, in lower case; a section or key may come twice."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#", ";"))
    parser.read_string(content)
    return {name.lower(): dict(parser.items(name)) for name in parser.sections()}


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
