"""What one run of a verb works with: home, settings, repository, key, hypervisor, catalogue; opened when first used.

    Session ── home, settings            files
           ├── repository, spec          the store, and how our child processes open the same store
           ├── hypervisor(uri)           where the domains are; hypervisor_at(uri): just there
           └── catalogue                 the cache that lists are made from

A session belongs to one thread. `close` lets go of everything; nothing that runs on (keeper, guest) depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from appliance.config import DEFAULT_SETTINGS, Home, Settings, load_settings
from appliance.errors import DomainNotFound, NotProtected, RepositoryNotFound, WrongKey
from appliance.service import locks

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.hypervisor.base import Domain, Hypervisor
    from appliance.store import Key, Repository, RepositorySpec
    from appliance.timeline.catalogue import Catalogue

__all__ = ["Progress", "Session", "silent"]

log = logging.getLogger(__name__)

# done bytes, total bytes (0 = unknown), what is being done
Progress = Callable[[int, int, str], None]


def silent(_done: int, _total: int, _what: str = "") -> None:
    """Progress that nobody looks at."""


def _where_is_it(url: str) -> str:
    """What to look at where a home's repository is missing; never to make a new one, which would hide the points."""
    if "://" in url:
        return "this home had its repository there: is the endpoint right, and may these credentials see the bucket?"
    there = next(path for path in (Path(url), *Path(url).parents) if path.exists())
    return f"this home had its repository there: is it mounted? `findmnt --target {there}` tells what lies there now"


class Session:
    """`connect` overrides the settings' URI. `say` gets sentences for a person while a verb works, `warnings` has those
    that a program should know, too; `ask` shows a prompt and gives the secret that was typed; None when nobody is
    there. `key` saves unlocking it again."""

    def __init__(
        self,
        home: Home,
        connect: str | None = None,
        *,
        say: Callable[[str], None] = lambda _text: None,
        ask: Callable[[str], str] | None = None,
        settings_file: Path = DEFAULT_SETTINGS,
        key: Key | None = None,
    ) -> None:
        self.home, self.connect, self.say, self.ask = home, connect, say, ask
        self.settings_file = settings_file
        if key is not None:
            self.key = key
        self.warnings: list[str] = []
        self._stack = ExitStack()
        self._hypervisors: dict[str, Hypervisor] = {}
        self._mentioned: set[str] = set()
        self._kept = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:  # the first error is the one to tell; letting go of a dead libvirt may well fail again
            if kind is None:
                raise
            log.warning("closing failed as well", exc_info=True)

    def close(self) -> None:
        self._stack.close()

    def warn(self, text: str) -> None:
        """Say once what one should know of what is done, and keep it for the verb's record."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(text)

    def mention(self, text: str) -> None:
        """Say it once, however often a verb comes across it."""
        if text not in self._mentioned:
            self._mentioned.add(text)
            self.say(text)

    @cached_property
    def settings(self) -> Settings:
        return load_settings(self.home, self.settings_file)

    @cached_property
    def instance(self) -> dict[str, Any]:
        """What `init` wrote. Raises ConfigError when this is no home."""
        return self.home.instance()

    @cached_property
    def spec(self) -> RepositorySpec:
        """How a child process opens the repository."""
        from appliance.service import keys

        return keys.specification(self)

    @cached_property
    def key(self) -> Key | None:
        """Unlocked once; None when the repository is not encrypted. Raises WrongKey."""
        from appliance.service import keys

        return keys.key_of(self)

    @cached_property
    def repository(self) -> Repository:
        """Raises RepositoryNotFound, WrongKey with what to do in this home, and what `Repository.open` raises."""
        from appliance.service import keys
        from appliance.store import Repository, open_backend

        instance, key = self.instance, self.key
        with suppress(OSError):  # the repository names it when it makes its own folder there
            self.home.cache.mkdir(mode=0o700, exist_ok=True)
        try:
            repository = Repository.open(open_backend(instance["url"]), cache=self.home.cache, key=key)
        except WrongKey as error:
            raise keys.explained(self, key, error) from None
        except RepositoryNotFound as error:
            raise RepositoryNotFound(**error.fields, hint=_where_is_it(error.fields["url"])) from None
        self._stack.callback(repository.close)
        return repository

    @property
    def opened(self) -> bool:
        """Whether `repository` has been opened, so that asking it again does not fail again."""
        return "repository" in vars(self)

    @cached_property
    def catalogue(self) -> Catalogue:
        from appliance.timeline.catalogue import Catalogue

        catalogue = Catalogue(self.home.cache / "catalogue.sqlite", self.repository)
        self._stack.callback(catalogue.close)
        return catalogue

    def keep_from_gc(self) -> None:
        """Nothing is collected until this session is closed: for who reads what no point refers to. Raises Locked."""
        if not self._kept:
            self._stack.enter_context(self.repository.session("a look"))
            self._kept = True

    @property
    def uri(self) -> str:
        """Where verbs look that name no protected domain."""
        return self.connect or self.settings.uri

    def hypervisor(self, uri: str | None = None) -> Hypervisor:
        """Where a verb works: `connect` wins over `uri`. Connected once for each URI. Raises ConnectError."""
        return self.hypervisor_at(self.connect or uri or self.settings.uri)

    def hypervisor_at(self, uri: str) -> Hypervisor:
        """As `hypervisor`, whatever `connect` is: where something is known to be, and is nowhere else."""
        from appliance.hypervisor import connect

        if uri not in self._hypervisors:
            made = connect(uri)
            self._hypervisors[uri] = made
            self._stack.callback(made.close)
        return self._hypervisors[uri]

    def domain(self, name: str) -> Domain:
        """A domain by name or UUID, where its protection record says it lives or else at `uri`. Raises DomainNotFound,
        of a protected one with the way on."""
        record = self.record(name)
        if record is None:
            from appliance.service.naming import found

            return found(self, name)
        try:
            return self.hypervisor(record.uri).domain(record.uuid)
        except DomainNotFound:
            from appliance.service.naming import lost

            raise lost(self, record) from None

    def record(self, name: str) -> Protection | None:
        """The protection record of a domain by name or UUID, or None."""
        from appliance.capture import protection

        self.instance  # noqa: B018  a folder that is no home has no records either, and that must not look the same
        found = [one for one in protection.all_records(self.home) if name in (one.domain, one.uuid)]
        return found[0] if found else None

    def protected(self, name: str) -> Protection:
        """As `record`. Raises NotProtected, with a name that looks like it where there is one."""
        record = self.record(name)
        if record is None:
            from appliance.service.naming import meant

            raise NotProtected(domain=name, hint=meant(self, name))
        return record

    def hold(self, uuid: str, domain: str, purpose: str, wait: float = 0.0) -> AbstractContextManager[None]:
        """The one lock of a domain in this home; see `locks`. Raises Locked."""
        return locks.hold(self.home, uuid, domain, purpose, wait, self.say)

    @contextmanager
    def claim(self, domain: Domain, purpose: str, wait: float = 0.0) -> Iterator[None]:
        """The domain's block graph on this host, against other homes; see `hostlock`. Held inside `hold`. Raises
        Locked, and RevertUnderWay where another home has left the disks half-way."""
        from appliance.hypervisor import hostlock

        names = hostlock.of_domain(domain)
        with hostlock.hold(names, domain.name, self.home.path, purpose, wait, self.say):
            self.refuse_half_way(names, domain.uuid, domain.name)
            yield

    def refuse_half_way(self, names: Sequence[str], uuid: str, domain: str) -> None:
        """See `neighbours`; lasts no longer than the locks of these names are held."""
        from appliance.restore import neighbours

        neighbours.refuse_half_way(self.home, Path(self.settings.hook_directory), names, uuid, domain)

    def busy(self, uuid: str) -> str | None:
        """Who works on the domain now, in words."""
        return locks.holder(self.home, uuid)

    def daemon_runs(self) -> bool:
        """Whether a daemon serves this home."""
        return locks.taken(locks.daemon_lock(self.home))
