"""The tables of one kernel release: which modules it has, what they need, which devices they drive.

    tables_from_tree   a guest's /lib/modules/RELEASE      parse    the files as bytes
    tables_from_folder a folder of this machine            merge    a client's tables and those of the driver store
    pack, unpack       as bytes, for a template to keep

Read are modules.dep, modules.alias, modules.softdep, modules.builtin and modules.builtin.modinfo (source of the
formats: depmod(8) and modules.dep(5) of kmod). All of it may be hostile: files, lines and counts have limits, patterns
are compared in bounded time (`glob`), a path that is not a plain one below the folder is left out.

Names have `_` for `-` throughout. Tables never change; any thread may share them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import zstandard

from appliance.errors import GuestUnreadable
from appliance.units import MiB
from images.drivers.glob import Budget, Index
from images.tree import Tree

__all__ = [
    "FILES", "Module", "Soft", "Tables", "merge", "module_name", "pack", "parse", "plain_path", "soft_of",
    "tables_from_folder", "tables_from_tree", "unpack",
]  # fmt: skip

# Name → most bytes. Debian's generic kernel has 1.3 MiB of aliases, in 26 000 lines. The first two must be there.
FILES: Mapping[str, int] = {
    "modules.dep": 8 * MiB,
    "modules.alias": 16 * MiB,
    "modules.softdep": MiB,
    "modules.builtin": MiB,
    "modules.builtin.modinfo": 4 * MiB,
}
_NEEDED = ("modules.dep", "modules.alias")
_LINES = 250_000
_LINE = 64 * 1024
_PATTERN = 2048
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9_.+]{1,128}")
_PATH = re.compile(r"[A-Za-z0-9_.,+~@-]+(/[A-Za-z0-9_.,+~@-]+)*")
_SUFFIX = re.compile(r"\.ko(\.[a-z0-9]+)?$")


@dataclass(frozen=True, slots=True)
class Module:
    """`path` is relative to the release's folder. `depends` are names of modules that must be inserted before; a name
    of the kernel itself may be among them. `origin` is `client`, or the name of what the driver store has it from.
    `signed`: whether a signature hangs on it; None for the client's own, whose files are not looked at."""

    name: str
    path: str
    depends: tuple[str, ...] = ()
    origin: str = "client"
    signed: bool | None = None


@dataclass(frozen=True, slots=True)
class Soft:
    """Names or aliases that should be inserted before and behind a module, where there are such."""

    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tables:
    """`files` are the bytes that they were read from, for `pack`; empty when they were merged or computed."""

    release: str
    modules: Mapping[str, Module]
    builtin: frozenset[str]
    soft: Mapping[str, Soft]
    indexes: tuple[Index, ...]
    notes: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        return name in self.modules or name in self.builtin

    def named(self, alias: str, budget: Budget | None = None) -> tuple[str, ...]:
        """All names that the tables have for an alias, also of drivers that this kernel does not have."""
        budget = budget or Budget()
        return tuple(dict.fromkeys(name for index in self.indexes for name in index.match(alias, budget)))

    def match(self, alias: str, budget: Budget | None = None) -> tuple[str, ...]:
        """The modules and built-in drivers for a device, best first as depmod orders them. Raises GuestUnreadable when
        the comparisons cost more than the budget (a fresh one when there is none)."""
        return tuple(name for name in self.named(alias, budget) if self.has(name))

    def resolve(self, name: str, budget: Budget | None = None) -> tuple[str, ...]:
        """What `modprobe NAME` would load: the module or built-in driver of that name, else those with that alias."""
        plain = name.replace("-", "_")
        return (plain,) if self.has(plain) else self.match(name, budget)


def module_name(path: str) -> str:
    """`kernel/drivers/net/virtio-net.ko.xz` → `virtio_net`."""
    return _SUFFIX.sub("", path.rpartition("/")[2]).replace("-", "_")


def plain_path(path: str) -> bool:
    """Whether it is a path of a module that stays below the folder it is relative to."""
    parts = path.split("/")
    return (
        len(path) <= 512
        and _PATH.fullmatch(path) is not None
        and not {".", ".."} & set(parts)
        and _SUFFIX.search(path) is not None
        and _NAME.fullmatch(module_name(path)) is not None
    )


def tables_from_tree(tree: Tree, folder: str) -> Tables:
    """Those of the guest's folder of modules, whose last part is the release. Raises GuestUnreadable: one of the two
    necessary files is missing, or a limit is exceeded."""

    def read(name: str, limit: int) -> bytes:
        return tree.read(f"{folder.rstrip('/')}/{name}", limit)

    return _gather(folder.rstrip("/").rpartition("/")[2], read)


def tables_from_folder(folder: Path) -> Tables:
    """As `tables_from_tree`, of a folder of this machine that depmod has been at (an unpacked kernel package)."""

    def read(name: str, limit: int) -> bytes:
        with (folder / name).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise GuestUnreadable(what=str(folder / name), reason=f"it has more than {limit} bytes")
        return data

    return _gather(folder.name, read)


def _gather(release: str, read: Callable[[str, int], bytes]) -> Tables:
    files = {}
    for name, limit in FILES.items():
        try:
            files[name] = read(name, limit)
        except FileNotFoundError:
            if name in _NEEDED:
                raise GuestUnreadable(
                    what=f"the modules of kernel {release}", reason=f"there is no {name}", hint="depmod writes it"
                ) from None
    return parse(release, files)


def parse(release: str, files: Mapping[str, bytes]) -> Tables:
    """From the files' bytes; a file that is left out is empty. Raises GuestUnreadable naming file and limit."""
    if not _RELEASE.fullmatch(release):
        raise GuestUnreadable(what="a kernel's folder of modules", reason=f"{release!r} is no kernel release")
    reader = _Files(release, files)
    modules, left_out = _modules(reader)
    builtin = frozenset(module_name(path) for path in reader.lines("modules.builtin") if plain_path(path))
    indexes = (
        Index(_aliases(reader), reader.what("modules.alias")),
        Index(_builtin_aliases(reader), reader.what("modules.builtin.modinfo")),
    )
    note = (f"{left_out} modules of kernel {release} have unusable paths and are left out",) if left_out else ()
    return Tables(release, modules, builtin, _soft(reader), indexes, note, dict(files))


def merge(client: Tables, *stores: Tables) -> Tables:
    """One table of the client's modules and those of the driver store that it lacks: its own come first, always.

    All are of one release, else ValueError: a module of another is never usable, so asking is a mistake.
    """
    for one in stores:
        if one.release != client.release:
            raise ValueError(f"modules of kernel {one.release} cannot be used with {client.release}")
    modules, soft = dict(client.modules), dict(client.soft)
    for one in stores:
        for name, module in one.modules.items():
            if name not in modules and name not in client.builtin:
                modules[name] = module
                if name in one.soft:
                    soft[name] = one.soft[name]
    indexes = tuple(index for one in (client, *stores) for index in one.indexes)
    notes = tuple(note for one in (client, *stores) for note in one.notes)
    return replace(client, modules=modules, soft=soft, indexes=indexes, notes=notes, files={})


def pack(tables: Tables) -> bytes:
    """As bytes, the same for the same tables. ValueError for merged or computed ones, which have no files."""
    if not tables.files:
        raise ValueError(f"the tables of kernel {tables.release} were not read from files")
    texts = {name: tables.files[name].decode("latin-1") for name in sorted(tables.files)}
    return zstandard.compress(json.dumps({"release": tables.release, "files": texts}).encode(), 9)


def unpack(data: bytes) -> Tables:
    """What `pack` gave. Raises GuestUnreadable when it is damaged."""
    try:
        document = json.loads(zstandard.decompress(data, max_output_size=6 * sum(FILES.values())))
        files = {name: document["files"][name].encode("latin-1") for name in FILES if name in document["files"]}
        release = str(document["release"])
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GuestUnreadable(what="a packed table of modules", reason=f"it is damaged ({error})") from error
    return parse(release, files)


class _Files:
    """The files' lines, within the limits."""

    def __init__(self, release: str, files: Mapping[str, bytes]) -> None:
        self._release = release
        self._files = files

    def what(self, name: str) -> str:
        return f"{name} of kernel {self._release}"

    def lines(self, name: str, end: str = "\n") -> Iterator[str]:
        data = self._files.get(name, b"")
        if len(data) > FILES[name]:
            raise GuestUnreadable(what=self.what(name), reason=f"it has more than {FILES[name]} bytes")
        found = data.decode("utf-8", "replace").split(end)
        if len(found) > _LINES:
            raise GuestUnreadable(what=self.what(name), reason=f"it has more than {_LINES} lines")
        for number, line in enumerate(found, 1):
            if len(line) > _LINE:
                raise GuestUnreadable(what=self.what(name), reason=f"line {number} has more than {_LINE} characters")
            line = line.strip()
            if line and not line.startswith("#"):
                yield line


def _modules(reader: _Files) -> tuple[dict[str, Module], int]:
    modules: dict[str, Module] = {}
    left_out = 0
    for line in reader.lines("modules.dep"):
        path, _, rest = line.partition(":")
        if not plain_path(path):
            left_out += 1
            continue
        name = module_name(path)
        # depmod lists the module that must be inserted first last.
        depends = (module_name(one) for one in reversed(rest.split()))
        # Two of one name: depmod lists only the one that its search order prefers, so the first is right.
        modules.setdefault(name, Module(name, path, tuple(one for one in dict.fromkeys(depends) if one != name)))
    return modules, left_out


def _aliases(reader: _Files) -> Iterator[tuple[str, str]]:
    for line in reader.lines("modules.alias"):
        word, _, rest = line.partition(" ")
        pattern, _, name = rest.strip().rpartition(" ")
        if word == "alias":
            yield from _usable(reader, "modules.alias", pattern.strip(), name)


def _builtin_aliases(reader: _Files) -> Iterator[tuple[str, str]]:
    for record in reader.lines("modules.builtin.modinfo", "\0"):
        key, _, value = record.partition("=")
        name, _, word = key.rpartition(".")
        if word == "alias":
            yield from _usable(reader, "modules.builtin.modinfo", value, name)


def _usable(reader: _Files, file: str, pattern: str, name: str) -> Iterable[tuple[str, str]]:
    if len(pattern) > _PATTERN:
        raise GuestUnreadable(what=reader.what(file), reason=f"an alias has more than {_PATTERN} characters")
    name = name.replace("-", "_")
    return ((pattern, name),) if pattern and _NAME.fullmatch(name) else ()


def _soft(reader: _Files) -> dict[str, Soft]:
    """Lines `softdep NAME pre: A B post: C`. Names before any `pre:` are none that modprobe would load."""
    found: dict[str, Soft] = {}
    for line in reader.lines("modules.softdep"):
        word, _, rest = line.partition(" ")
        name, _, rest = rest.strip().partition(" ")
        if word == "softdep" and _NAME.fullmatch(name.replace("-", "_")):
            name = name.replace("-", "_")
            old, new = found.get(name, Soft()), soft_of(rest)
            found[name] = Soft(old.before + new.before, old.behind + new.behind)
    return found


def soft_of(text: str) -> Soft:
    """`pre: a b post: c`, as it stands in a module and behind its name in modules.softdep."""
    lists: dict[str, list[str]] = {"": [], "pre:": [], "post:": []}
    which = ""
    for word in text.split():
        if word in lists:
            which = word
        elif len(word) <= _PATTERN:
            lists[which].append(word)
    return Soft(tuple(lists["pre:"]), tuple(lists["post:"]))
