"""What two domains cannot have at the same time, taken out of a definition that is to stand beside the old one.

QEMU removes a socket that lies where it is to listen and begins a log file anew, so a copy that kept these paths would
take them away from the domain that runs. What libvirt can choose anew (sockets of channels, ports) is left to libvirt;
a serial line becomes a pseudo terminal; a device that means nothing without its other end is left out. What is made to
be shared (bridges, CD images, folders of virtiofs) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from xml.etree.ElementTree import Element

__all__ = ["take_out"]

# The other end of these is inside QEMU, or libvirt makes one for each domain.
_INSIDE = ("pty", "null", "vc", "stdio", "spicevmc", "spiceport", "qemu-vdagent", "dbus")
# Where libvirt puts a channel's socket by itself: nobody chose that path, so nobody misses it.
_CHOSEN_BY_LIBVIRT = "/channel/target/domain-"
_COMMAND_LINE = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline"


def take_out(root: Element) -> list[str]:
    """Change the domain's definition in place; one sentence for each thing that the new domain lacks."""
    told: list[str] = []
    devices = root.find("devices")
    if devices is not None:
        told += _lines(devices)
        for tag, excluded in _EXCLUDED.items():
            told += _without(devices, tag, excluded)
        for graphics in devices.iterfind("graphics"):
            told += _graphics(graphics)
        for rule in (_floppies, _tpm_folders, _addresses, _files):
            told += rule(devices)
    return told + _command_line(root)


# --- serial lines and channels ----------------------------------------------------------------------------------------


def _lines(devices: Element) -> list[str]:
    """By the path, because libvirt shows the first serial line a second time, as a console."""
    told: dict[str, str] = {}
    for tag in ("serial", "parallel", "console", "channel"):
        for number, line in enumerate(devices.findall(tag)):
            target = line.find("target")
            name = f"{tag} {(target.get('name') if target is not None else None) or number}"
            for place, sentence in (*_log(line, name), *_other_end(line, name)):
                told.setdefault(place, sentence)
    return list(told.values())


def _log(line: Element, name: str) -> list[tuple[str, str]]:
    log = line.find("log")
    if log is None:
        return []
    line.remove(log)
    path = log.get("file", "")
    return [(path, f"{name}: its log file {path}, which is the old domain's")]


def _other_end(line: Element, name: str) -> list[tuple[str, str]]:
    kind = line.get("type", "pty")
    if kind in _INSIDE:
        return []
    places = [_place(source) for source in line.findall("source")]
    for tag in ("source", "protocol"):
        for child in line.findall(tag):
            line.remove(child)
    target = line.find("target")
    anew = kind == "unix" and line.tag == "channel" and target is not None and target.get("type") == "virtio"
    if not anew:
        line.set("type", "pty")
    instead = "libvirt makes another socket" if anew else "it becomes a pseudo terminal"
    return [
        (place, f"{name}: {kind} {place}, which is the old domain's; {instead}")
        for place in places
        if place and _CHOSEN_BY_LIBVIRT not in place
    ]


def _place(source: Element) -> str:
    """A path, or host and port."""
    return source.get("path") or ":".join(filter(None, (source.get("host"), source.get("service"))))


# --- devices that are left out ----------------------------------------------------------------------------------------


def _child(path: str, *attributes: str) -> Callable[[Element], str]:
    """Makes a function that gives what a device's other end is called; empty when the child is not there."""

    def look(device: Element) -> str:
        found = device.find(path)
        if found is None:
            return ""
        return " ".join(filter(None, (found.get(name) for name in attributes))) or (found.text or "").strip() or path

    return look


def _network(interface: Element) -> str:
    """Those whose other end takes one domain only; a bridge takes many."""
    if interface.get("type") not in ("vhostuser", "vdpa", "hostdev"):
        return ""
    source = interface.find("source")
    return f"{interface.get('type')} {(source.get('path') or source.get('dev') or '') if source is not None else ''}"


def _host_device(device: Element) -> str:
    words = [device.get("type", "")]
    source = device.find("source")
    for part in source.iter() if source is not None else ():
        words += part.attrib.values()
    return " ".join(words).strip()


def _of_type(*types: str) -> Callable[[Element], str]:
    def look(device: Element) -> str:
        source = device.find("source")
        place = (_place(source) or source.get("dev", "")) if source is not None else ""
        return f"{device.get('type')} {place}".strip() if device.get("type") in types else ""

    return look


def _smartcard(card: Element) -> str:
    passed = card.get("mode") == "passthrough" and card.get("type") != "spicevmc"
    return card.get("mode", "") if passed or card.get("mode") == "host" else ""


def _tpm(tpm: Element) -> str:
    backend = tpm.find("backend")
    kind = backend.get("type", "") if backend is not None else ""
    return kind if kind in ("passthrough", "external") else ""


# tag → function that says what the device hangs on, or nothing when it may stay.
_EXCLUDED: dict[str, Callable[[Element], str]] = {
    "disk": lambda disk: _child("source", "dev", "name")(disk) if disk.get("device") == "lun" else "",
    "interface": _network,
    "hostdev": _host_device,
    "tpm": _tpm,
    "shmem": lambda shmem: shmem.get("name", "shmem"),
    "memory": _child("source/path"),
    "filesystem": lambda one: _child("source", "socket")(one) if one.find("source[@socket]") is not None else "",
    "redirdev": _of_type("tcp", "udp", "unix", "dev", "file", "pipe"),
    "input": _of_type("passthrough", "evdev"),
    "smartcard": _smartcard,
    "lease": _child("target", "path"),
    "rng": lambda rng: "egd" if rng.find("backend[@model='egd']") is not None else "",
}


def _without(devices: Element, tag: str, excluded: Callable[[Element], str]) -> list[str]:
    told = []
    for device in devices.findall(tag):
        if place := excluded(device):
            devices.remove(device)
            told.append(f"{tag} {place.strip()}: it can be in one domain at a time")
    return told


# --- what libvirt chooses anew ----------------------------------------------------------------------------------------


def _graphics(graphics: Element) -> list[str]:
    name = f"graphics {graphics.get('type', '')}"
    sockets = [one for one in (graphics, *graphics.findall("listen")) if one.get("socket")]
    paths = dict.fromkeys(one.attrib.pop("socket") for one in sockets)
    if paths and graphics.find("listen") is None:
        # Without it the screen that was behind a socket would listen on a port.
        graphics.append(Element("listen", type="socket"))
    told = [f"{name}: its socket {path}, which is the old domain's; libvirt makes another one" for path in paths]
    if address := graphics.attrib.pop("address", ""):
        told.append(f"{name}: its bus {address}, which is the old domain's")
    ports = [port for one in ("port", "tlsPort", "websocket") if (port := graphics.get(one, "-1")) != "-1"]
    if ports and graphics.get("autoport") != "yes":
        for one in ("tlsPort", "websocket"):
            graphics.attrib.pop(one, None)
        graphics.attrib.update(port="-1", autoport="yes")
        told.append(f"{name}: its port {', '.join(ports)}; libvirt chooses a free one")
    return told


def _floppies(devices: Element) -> list[str]:
    """QEMU opens a floppy for writing."""
    told = []
    for disk in devices.iterfind("disk[@device='floppy']"):
        for source in disk.findall("source"):
            disk.remove(source)
            told.append(f"floppy {source.get('file') or source.get('dev') or ''}: the drive is empty")
    return told


def _tpm_folders(devices: Element) -> list[str]:
    """Whether the state begins empty is told by whoever knows."""
    for backend in devices.iterfind("tpm/backend"):
        for source in backend.findall("source"):
            backend.remove(source)
    return []


def _addresses(devices: Element) -> list[str]:
    told = []
    for cid in devices.iterfind("vsock/cid"):
        if cid.get("auto") != "yes" and (address := cid.attrib.pop("address", "")):
            cid.set("auto", "yes")
            told.append(f"vsock: its address {address}; libvirt chooses a free one")
    return told


def _files(devices: Element) -> list[str]:
    told = []
    for audio in devices.iterfind("audio[@type='file']"):
        audio.set("type", "none")
        told.append(f"audio: the file {audio.attrib.pop('path', '')}, which is the old domain's")
    for backend in devices.iterfind("interface/backend"):
        if path := backend.attrib.pop("logFile", ""):
            told.append(f"interface: its log file {path}, which is the old domain's")
    return told


def _command_line(root: Element) -> list[str]:
    """Words for QEMU that libvirt does not understand, and neither do we: with a path in them they may be anything."""
    told = []
    for element in root.findall(_COMMAND_LINE):
        if any("/" in word.get("value", "") for word in element):
            root.remove(element)
            told.append("qemu:commandline: there are paths in it that the old domain may be using")
    return told
