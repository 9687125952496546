"""What a system is: as it lies in the point, and as it tells of itself after a boot. Both by the same few facts.

    lying(tree)       read from the point by the confined reader; nothing of it runs
    heard(bytes)      what `report.sh` wrote to its serial line. It comes from a guest: hostile
    differences       in what the two differ, one sentence each
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from appliance.errors import GuestUnreadable
from images.tree import Kind, Tree

__all__ = ["LARGEST", "Manifest", "differences", "heard", "lying"]

# Of a report, in bytes: some 5000 files in /etc.
LARGEST = 1 << 20
_FACTS = frozenset({
    "kernel", "running_host_name", "command_line", "boot_id", "system", "root", "efi", "host_name", "machine_id",
    "system_name", "packages",
})  # fmt: skip
_LISTS = frozenset({"failed", "listening", "card"})
_MOST = 10_000
_FILE = 8 << 20
_ALL_FILES = 128 << 20
_DPKG = "/var/lib/dpkg/status"
# What a running system writes there by itself, on any start.
_LIVES = re.compile(
    r"/etc/(resolv\.conf|mtab|adjtime|\.updated|\.pwd\.lock|fake-hwclock\.data|ld\.so\.cache|lvm/(archive|backup)/.*"
    r"|(passwd|group|shadow|gshadow|subuid|subgid)-)"
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """`facts` by name, `lists` by name (`failed`, `listening`, `card`), `files` path → first 16 digits of SHA-256,
    `links` are symbolic ones. `begun`, `complete`: a report has its beginning, and its end."""

    facts: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    links: frozenset[str] = frozenset()
    begun: bool = False
    complete: bool = False

    def document(self) -> dict[str, Any]:
        """For JSON. `etc` and `services` stand for many lines."""
        etc = "".join(f"{digest}  {path}\n" for path, digest in sorted(self.files.items()) if not _LIVES.match(path))
        enabled = sorted(path for path in self.links if path.startswith("/etc/systemd/system/"))
        return {
            **self.facts, **{name: list(values) for name, values in self.lists.items()},
            "users": self.files.get("/etc/passwd", ""), "package_list": self.files.get(_DPKG, ""),
            "etc": _digest(etc.encode()), "services": _digest("\n".join(enabled).encode()), "files": len(self.files),
            "complete": self.complete,
        }  # fmt: skip


def heard(data: bytes) -> Manifest:
    """A report, or as much of it as has come. What is no line of one is passed over; never raises."""
    facts: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    links: set[str] = set()
    marks: set[str] = set()
    for line in data[:LARGEST].decode(errors="replace").split("\n")[:-1]:
        word, _, text = "".join(c for c in line if c.isprintable()).partition(" ")
        text = text.strip()
        if word == "file" and (found := re.fullmatch(r"([0-9a-f]{16}) (/.*)", text)):
            files[found[2]] = found[1]
        elif word == "link" and text.startswith("/"):
            links.add(text)
        elif word in _FACTS:
            facts[word] = text
        elif word in _LISTS and text:
            lists.setdefault(word, []).append(text)
        elif word == "rewind-report":
            marks.add(text)
    return Manifest(
        facts, {name: tuple(values) for name, values in lists.items()}, files, frozenset(links),
        "begin" in marks, "end" in marks,
    )  # fmt: skip


def lying(tree: Tree) -> Manifest:
    """Of a point. What cannot be read is not in it: a boot tells more than this. Raises GuestUnreadable when the reader
    has ended."""
    facts = {}
    for name, path in (("host_name", "/etc/hostname"), ("machine_id", "/etc/machine-id")):
        data = _content(tree, path)
        if data is not None:
            facts[name] = " ".join(data.decode(errors="replace").split())
    files: dict[str, str] = {}
    links: set[str] = set()
    left = _ALL_FILES
    for path, kind in _walk(tree):
        if kind is Kind.LINK:
            links.add(path)
            continue
        data = _content(tree, path) if left > 0 else None
        if data is not None:
            left -= len(data)
            files[path] = _digest(data)
            if path == _DPKG:
                facts["packages"] = str(len(re.findall(rb"^Status: install ok installed$", data, re.MULTILINE)))
    return Manifest(facts, {}, files, frozenset(links), True, True)


def differences(point: Manifest, seen: Manifest) -> list[str]:
    """What the system does not have as it was in the point. A file that one of them could not read is not told; neither
    is what every start changes."""
    found = [
        f"{name.replace('_', ' ')} is {seen.facts[name]!r} and was {value!r}"
        for name, value in point.facts.items()
        if seen.facts.get(name, value) != value
    ]
    for path, digest in sorted(point.files.items()):
        if seen.files.get(path, digest) != digest and not _LIVES.match(path):
            found.append(f"{path} is another one")
    if seen.files:
        gone = sorted(path for path in point.files.keys() - seen.files.keys() if not _LIVES.match(path))
        new = sorted(path for path in seen.files.keys() - point.files.keys() if not _LIVES.match(path))
        found += [f"{path} is gone" for path in gone] + [f"{path} is new" for path in new]
    return found


def _walk(tree: Tree) -> Iterator[tuple[str, Kind]]:
    """Files and links below /etc, and the list of packages; at most 10 000."""
    waiting, count = ["/etc"], 0
    while waiting:
        folder = waiting.pop()
        try:
            names = tree.list(folder)
        except FileNotFoundError:
            continue
        for name in names:
            count += 1
            if count > _MOST or "\n" in name or "\\" in name:
                continue
            path = f"{folder}/{name}"
            kind = tree.kind(path)
            if kind is Kind.FOLDER:
                waiting.append(path)
            elif kind is not Kind.OTHER:
                yield path, kind
    yield _DPKG, Kind.FILE


def _content(tree: Tree, path: str) -> bytes | None:
    try:
        return tree.read(path, _FILE)
    except FileNotFoundError:
        return None
    except GuestUnreadable:
        tree.list("/")  # the file alone is of no use, or the reader has ended: then this raises
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
