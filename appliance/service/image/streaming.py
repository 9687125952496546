"""A machine somewhere boots from a point by an image of ours: no hypervisor of it is known, only its hardware.

serve     an image whose root comes from here, and the session that it belongs to
follow    until the machine is alone
listing   all sessions of this home, and how far each is
resume    the server again, after this host was restarted
forget    end a session, and drop what its machine has written

What the machine writes until it is alone is in the session (`appliance.restore.streams`), never in the point.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from appliance import nbd
from appliance.errors import AlreadyExists, ConfigError, Locked, NotSupported
from appliance.extents import Extent
from appliance.model import Point
from appliance.process import alone, lives
from appliance.restore import control, hydrations, streams
from appliance.service.elsewhere import choose, export
from appliance.service.image import drivers, making
from appliance.service.instant import resolve
from appliance.service.session import Progress, Session, silent
from images.build import Built, build_image
from images.drivers.plan import Options
from images.stream.layout import Layout, layout_of, plain_layout
from images.stream.settings import MODULES, Stream, stream_conf, with_stream
from images.stream.tls import Certificates, make_certificates
from images.template.settings import settings_for

__all__ = ["Choices", "Served", "Streamed", "follow", "forget", "known", "listing", "resume", "serve"]

_LOOK = 0.5


@dataclass(frozen=True, slots=True)
class Choices:
    """What a person may choose. `listen` is where we answer, `ADDRESS:PORT`; `reach` how the machine gets there when
    that is another one. `own`, `gateway`, `mac`, `local`, `overwrite`, `blank`, `patience` as in
    `images.stream.settings.Stream`. `insecure`: anybody may read and change what goes over the network."""

    listen: str
    reach: str = ""
    mode: Literal["stream", "copy"] = "stream"
    own: str = "dhcp"
    gateway: str = ""
    mac: str = ""
    local: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    blank: bool = False
    patience: int = 600
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """A session that waits for its machine, and the image in `built.folder`, which has its secret."""

    name: str
    point: str
    target: str
    mode: str
    address: str
    secure: bool
    built: Built
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Streamed:
    """How far a session is. `phase`: `waiting`, `booting`, `pulling`, `copying`, `done`, `stopped` (nobody serves it).
    `rate`: bytes a second that its machine's disks got in the last half minute. `answers`: whether its machine would be
    answered now. `silent_seconds`: since its machine last gave a sign of life, None before it came.
    `read_bytes`, `written_bytes` by its machine since it booted; `service_seconds` from its start to the system being
    up and `service_read_bytes` until then, None before that."""

    name: str
    point: str
    target: str
    mode: str
    phase: str
    done_bytes: int
    total_bytes: int
    left_bytes: int
    rate: int
    answers: bool
    silent_seconds: float | None
    read_bytes: int
    written_bytes: int
    boots: int
    service_seconds: int | None
    service_read_bytes: int | None
    left: tuple[str, ...]
    error: str


def serve(
    session: Session, domain: str, when: str, target: str, name: str, folder: Path, media: Sequence[str],
    choices: Choices, *, template: str = "", keys: Sequence[bytes] = (),
) -> Served:  # fmt: skip
    """Build the image of DOMAIN's point for `target` into `folder` and serve its root.

    Raises AlreadyExists (the name, the folder), ConfigError for choices that make no sense, NotSupported for a client
    whose own initrd has to find its root, or whose root cannot be streamed; RestoreError when the server does not
    start; and as `making.build`. Nothing is left then.
    """
    began = time.monotonic()
    point = resolve(session, domain, when)
    identity = f"rewind-{uuid.uuid4().hex[:16]}"
    certificates = Certificates({}, {}) if choices.insecure else make_certificates(identity)
    host, port = _place(choices.listen, "--listen")
    order = streams.Order(
        name, identity, str(uuid.uuid4()), point.id, target, session.spec.to_json(),
        {one.disk: one.map for one in choose(point, ())}, host, port, not choices.insecure, choices.mode,
        os.path.abspath(folder),
    )  # fmt: skip
    with _name(session, name), ExitStack() as undo, session.repository.session(f"{domain}, to be served as {name}"):
        _need_free(host, port)  # by somebody else: a session of this name is told of first
        planned, built = _build(
            session, point, target, Path(order.image), media, choices, order, certificates, template, keys
        )  # fmt: skip
        undo.callback(shutil.rmtree, order.image, ignore_errors=True)
        undo.callback(streams.tidy, session.home, name)
        where = streams.prepare(session.home, order, certificates.server)
        control.create(where / control.CONTROL, _extents(session, point) if choices.mode == "copy" else {})
        streams.launch(session.home, order, session.settings_file)
        undo.pop_all()
    return Served(
        name, point.id, target, choices.mode, f"{host}:{port}", order.tls, built, time.monotonic() - began,
        (*planned.plan.warnings, *_warnings(choices)),
    )  # fmt: skip


@contextmanager
def _name(session: Session, name: str) -> Iterator[None]:
    """The name is free, and nobody else takes it meanwhile."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        raise ConfigError(reason=f"{name!r} cannot be the name of a session", hint="letters, digits, `-`, `_`, `.`")
    where = streams.folder(session.home, name)
    where.parent.mkdir(exist_ok=True, mode=0o700)
    with _alone(session, name):
        if streams.load(session.home, name) or hydrations.load(session.home, name):
            raise AlreadyExists(url=str(session.home.path), name=f"image {name}", hint=f"`rewind image forget {name}`")
        shutil.rmtree(where, ignore_errors=True)  # of one that did not get as far as an order
        yield


@contextmanager
def _alone(session: Session, name: str) -> Iterator[None]:
    """Nobody else begins, resumes or ends the session of that name. Raises Locked."""
    with alone(streams.folder(session.home, name).parent / f".{name}.lock") as first:
        if not first:
            holder = "another `rewind image`, or the daemon,"
            raise Locked(url=f"the name {name!r}", holder=holder, hint="wait for its end")
        yield


def _build(
    session: Session, point: Point, target: str, folder: Path, media: Sequence[str], choices: Choices,
    order: streams.Order, certificates: Certificates, template: str, keys: Sequence[bytes],
) -> tuple[making.Planned, Built]:  # fmt: skip
    options = Options(stream=True, extra=MODULES)
    with making.prepared(session, point.domain_uuid, point.id, target, template, keys, options) as ready:
        plan = ready.planned.plan
        if plan.mode != "template":
            raise NotSupported(
                object=f"{plan.client.host!r}", reason="its own initrd has to find its root, and knows nothing of ours"
            )
        sizes = {one.disk: one.size for one in choose(point, ())}
        copies, volumes = choices.mode == "copy", ready.guest.volumes
        layout = plain_layout(sizes, volumes) if copies else layout_of(plan.client, volumes, sizes)
        stream = _stream(choices, order, layout, certificates.client)
        stream_conf(stream)  # refuses before anything is written
        built = build_image(
            plan, ready.guest.tree, ready.template, media=media, folder=folder,
            settings=with_stream(settings_for(plan), stream),
            driver_store=drivers.reader(ready.store, plan.client.release),
        )  # fmt: skip
        folder.chmod(0o700)  # the session's secret is in it
        return ready.planned, built


def _stream(choices: Choices, order: streams.Order, layout: Layout, certificates: Mapping[str, bytes]) -> Stream:
    address, port = _place(choices.reach or choices.listen, "--reach")
    if address == "0.0.0.0":
        raise ConfigError(reason="no machine can reach 0.0.0.0", hint="--reach says how it gets here")
    return Stream(
        order.session, address, port, layout, choices.mode, choices.own, choices.gateway, choices.mac,
        choices.patience, local=choices.local, overwrite=choices.overwrite, blank=choices.blank, tls=certificates,
    )  # fmt: skip


def _place(text: str, option: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        address = str(ipaddress.IPv4Address(host))
    except ValueError as error:
        raise ConfigError(reason=f"{option}: {text!r} is no IPv4 address and port", hint="10.0.0.5:10809") from error
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(reason=f"{option}: {port!r} is no port", hint="10.0.0.5:10809")
    return address, int(port)


def _need_free(host: str, port: int) -> None:
    """Raises ConfigError when we cannot answer there: told before an image is made that leads to it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            hint = "`ip -brief address` lists this host's addresses, `ss -ltn` the ports that are taken"
            reason = f"--listen: nobody can answer at {host}:{port}: {error.strerror}"
            raise ConfigError(reason=reason, hint=hint) from None


def _extents(session: Session, point: Point) -> dict[str, Iterable[Extent]]:
    """What has data on the disks that are to be copied."""
    found: dict[str, Iterable[Extent]] = {}
    with export(session, point.domain_uuid, point.id) as served:
        for disk in served.disks:
            with nbd.connect(served.servers[0].socket, disk.disk) as connection:
                found[disk.disk] = connection.extents(0, connection.size())
    return found


def _warnings(choices: Choices) -> list[str]:
    if choices.insecure:
        return ["the link is not encrypted: anybody on the way can read and change the disks"]
    return ["the image has the secret of this session: whoever has it can read and write what is served"]


# --- afterwards -----------------------------------------------------------------------------------------------------


def known(session: Session, name: str) -> bool:
    """Whether there is a session of that name, or what is left of one."""
    return streams.load(session.home, name) is not None or streams.half_forgotten(session.home, name)


def listing(session: Session) -> list[Streamed]:
    """All sessions of this home that are not forgotten, also while we look."""
    found = [streams.load(session.home, name) for name in streams.names(session.home)]
    return [_standing(session, order) for order in found if order is not None]


def follow(session: Session, name: str, progress: Progress = silent) -> Streamed:
    """Until the machine is alone, or nobody serves it any more. Raises ConfigError for an unknown name."""
    while True:
        found = _streamed(session, name)
        progress(found.done_bytes, found.total_bytes, f"{name}: {found.phase}")
        if found.phase in ("done", "stopped"):
            return found
        time.sleep(_LOOK)


def resume(session: Session, name: str) -> None:
    """Serve again, after this host was restarted or the server died: the machine waits for it, or is booted again. Also
    a session that is done: a machine that lost its power just then has to be told that its disks are complete.
    Raises ConfigError for an unknown name, Locked, RestoreError as `streams.launch`."""
    _order(session, name)
    with _alone(session, name):
        order = _order(session, name)  # it may have been forgotten, or started, before we had the name
        if not lives(streams.state(session.home, name).get("key", "")):
            # The key may come to us through another descriptor than to whoever began.
            streams.launch(session.home, replace(order, repository=session.spec.to_json()), session.settings_file)


def forget(session: Session, name: str, force: bool = False) -> None:
    """End a session. Raises Locked, ConfigError for an unknown name, and unless `force` for a machine that is not
    alone yet: what it has written would be lost. OSError; may be repeated when it was broken off."""
    if not streams.half_forgotten(session.home, name):
        _order(session, name)
    with _alone(session, name):
        found = None if streams.half_forgotten(session.home, name) else _streamed(session, name)
        if found is not None and found.boots and found.phase != "done" and not force:
            reason = f"the machine of {name!r} still needs it, and what it has written is nowhere else"
            raise ConfigError(reason=reason, hint="wait until `rewind image list` says done, or add --force")
        streams.tidy(session.home, name)


def _order(session: Session, name: str) -> streams.Order:
    if (order := streams.load(session.home, name)) is None:
        reason = f"nothing is served as {name!r} from here"
        raise ConfigError(reason=reason, hint="`rewind image list` lists what is")
    return order


def _streamed(session: Session, name: str) -> Streamed:
    return _standing(session, _order(session, name))


def _standing(session: Session, order: streams.Order) -> Streamed:
    name, state = order.name, streams.state(session.home, order.name)
    phase = streams.phase_of(session.home, name)
    service = state.get("service") or [None, None]
    total = sum(ref.size for ref in order.exports.values())
    done = total if phase == "done" else min(int(state.get("done", 0)), total)
    serves = phase not in ("done", "stopped")
    heard = float(state.get("heard", 0.0))
    return Streamed(
        name, order.point, order.target, order.mode, phase, done, total, total - done,
        int(state.get("rate", 0)) if serves else 0, serves and bool(state.get("answers")),
        max(0.0, time.time() - heard) if heard else None, int(state.get("read", 0)), int(state.get("written", 0)),
        int(state.get("boots", 0)), service[0], service[1], () if phase == "done" else tuple(order.exports),
        str(state.get("error", "")),
    )  # fmt: skip
