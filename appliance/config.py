"""Where an instance of Rewind keeps its state, and the settings an admin may give it.

    HOME (default /var/lib/rewind)
      instance.json         repository URL, key file, id of this instance: written by `rewind init`
      key                   the key file that `init` made (mode 0600), unless another place was named
      cache/                catalogue, chunk index, what images are made with; deleting it costs time, never data
      domains/UUID.json     one protection record for each protected domain
      run/UUID/             sockets, scratch files and results of what is running now (mode 0711: QEMU passes through)
      spool/UUID/           the newest part of the journal of a domain that is captured continuously
      reverts/UUID/         intent, patch and overlay of a revert that has not ended
      ledger/               what continuous capture covered, one file for each domain: the truth about gaps
      log/                  logs of our helpers

Settings come from `/etc/rewind/rewind.yaml`, `conf.d/*.yaml` beside it in name order, then `HOME/rewind.yaml`; an
unknown key is an error that names it and the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from appliance.errors import ConfigError, PermissionDenied

__all__ = ["DEFAULT_HOME", "DEFAULT_SETTINGS", "Home", "Settings", "load_settings", "write_json"]

DEFAULT_HOME = Path("/var/lib/rewind")
DEFAULT_SETTINGS = Path("/etc/rewind/rewind.yaml")


@dataclass(frozen=True)
class Settings:
    """Every setting with its default and, as metadata in pydantic's words, its limits. Durations are seconds, sizes
    bytes, rates bytes a second (0 = no limit)."""

    uri: str = "qemu:///system"
    # Long enough for a busy disk, short enough that a stuck copy-before-write breaks the snapshot and not the guest.
    cbw_timeout: int = field(default=10, metadata={"ge": 1, "le": 600})
    rate_limit: int = field(default=0, metadata={"ge": 0})
    # What the guest overwrites while a point is pushed is kept in scratch files; if more than this would be needed for
    # a domain (its disks have equal shares), the point fails and the guest goes on.
    scratch_limit: int = field(default=0, metadata={"ge": 0})
    # How long a guest's read may wait in an instant revert while the view is being brought back.
    view_timeout: float = field(default=5.0, metadata={"gt": 0})
    # The last increment before a revert is pushed inside the pause: epochs repeat until it is smaller than this.
    pause_budget: int = field(default=8 << 20, metadata={"ge": 0})
    # A guest that writes too fast for that: the revert is refused when the last increment would stop it for longer.
    pause_limit: float = field(default=30.0, metadata={"gt": 0})
    freeze_timeout: float = field(default=10.0, metadata={"gt": 0})
    # An epoch that takes longer than this is given up and repeated.
    epoch_timeout: float = field(default=3600.0, metadata={"gt": 0})
    hook_directory: str = "/etc/libvirt/hooks"
    view_cache: int = field(default=64 << 20, metadata={"ge": 1 << 20})
    # Continuous capture: a power cut loses at most what was written within `journal_commit` before it. What is not in
    # sealed segments yet is in no repository either: `journal_segment_age` is how far that is behind. Each one costs a
    # guest that writes a little 8 KiB on the local disk, 0.3 KiB and one object in the repository, and 4 ms of CPU, so
    # 5 s are 17000 objects a day; with less than 2 s the requests to a paid store cost more than what they carry. A
    # guest that writes nothing makes no segments.
    journal_commit: float = field(default=0.2, metadata={"ge": 0.001, "le": 60})
    journal_segment_age: float = field(default=5.0, metadata={"ge": 0.1, "le": 86400})
    # The folder of a domain's journal takes no more than this (0: as much as the disk has); capture goes over to epochs
    # when it is full.
    journal_spool_limit: int = field(default=16 << 30, metadata={"ge": 0})
    # How finely the past of continuous capture is kept: every write for the first, then a point for each minute, then
    # for each hour (capture/tiers.py).
    journal_keep: float = field(default=4 * 3600.0, metadata={"ge": 0})
    minutes_keep: float = field(default=2 * 86400.0, metadata={"ge": 0})
    hours_keep: float = field(default=90 * 86400.0, metadata={"ge": 0})
    # What machines of ours run on (`image verify`, the reader of guests): `auto` is KVM where this host has it, else
    # emulation.
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    # A journal that lets a guest's write wait for longer is killed.
    journal_stall: float = field(default=0.25, metadata={"ge": 0.05, "le": 10})


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one instance. Making the object touches nothing; the directories come with `create`."""

    path: Path

    @property
    def instance_file(self) -> Path:
        return self.path / "instance.json"

    @property
    def key_file(self) -> Path:
        return self.path / "key"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def domains(self) -> Path:
        return self.path / "domains"

    @property
    def log(self) -> Path:
        return self.path / "log"

    def run(self, domain_uuid: str) -> Path:
        return self.path / "run" / domain_uuid

    def spool(self, domain_uuid: str) -> Path:
        return self.path / "spool" / domain_uuid

    def ledger(self, domain_uuid: str) -> Path:
        return self.path / "ledger" / f"{domain_uuid}.jsonl"

    def revert(self, domain_uuid: str) -> Path:
        return self.path / "reverts" / domain_uuid

    def create(self) -> None:
        """Make the directories. Only `run` can be passed through by others: QEMU runs as another user."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o711)
        own = ("reverts", "run", "ledger", "spool")
        for folder in (self.cache, self.domains, self.log, *(self.path / name for name in own)):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o711 if folder.name == "run" else 0o700)

    def instance(self) -> dict[str, Any]:
        """What `init` wrote. Raises ConfigError when there is nothing or it makes no sense, PermissionDenied."""
        try:
            loaded: dict[str, Any] = json.loads(self.instance_file.read_text())
        except FileNotFoundError:
            raise ConfigError(
                reason=f"{self.path} is not a home of rewind", hint="`rewind init` makes one; --home names another"
            ) from None
        except PermissionError as error:
            raise PermissionDenied(
                url=str(self.path), name=self.instance_file.name, reason="this user may not read it",
                hint="run it as the owner of the home, usually root",
            ) from error  # fmt: skip
        except (OSError, ValueError) as error:
            raise ConfigError(reason=f"cannot read {self.instance_file}: {error}") from error
        return loaded


def write_json(path: Path, value: Any, mode: int = 0o600) -> None:
    """Replace the file by `value` durably: after a crash it holds the old value or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: no temporary file stays
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_settings(home: Home, main: Path = DEFAULT_SETTINGS) -> Settings:
    """Merge the files. Raises ConfigError that names the file and the key."""
    merged: dict[str, Any] = {}
    for path in (main, *sorted((main.parent / "conf.d").glob("*.yaml")), home.path / "rewind.yaml"):
        merged.update(_read(path))
    return _validated(merged, "the settings")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(reason=f"cannot read {path}: {error}") from error
    import yaml

    try:
        loaded = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(reason=f"cannot read {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(reason=f"{path} is not a list of settings")
    _validated(loaded, str(path))
    return loaded


def _validated(values: dict[str, Any], origin: str) -> Settings:
    if not values:
        return Settings()
    # Here, and not at the head: importing it takes a quarter of the time in which a verb begins, and each of our
    # processes reads the settings, while few homes have any.
    from pydantic import ConfigDict, Field, ValidationError, create_model

    hints = get_type_hints(Settings)
    known: Any = {one.name: (hints[one.name], Field(default=one.default, **one.metadata)) for one in fields(Settings)}
    try:
        checked = create_model("Settings", __config__=ConfigDict(extra="forbid"), **known)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(reason=f"{origin}: setting {name!r}: {first['msg']}") from error
    return Settings(**checked.model_dump())
