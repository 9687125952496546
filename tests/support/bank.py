"""A bank in the Debian guest's PostgreSQL, and its books opened at any instant without booting a guest.

    with Bank(guest, clients) as bank: …         transactions go on; bank.must(instant) <= those in the database <=
    bank.end()                                   bank.may(instant), for each client, and they differ by one at most
    opened(socket, folder)                       what PostgreSQL finds on a served disk after its crash recovery

No transaction begins before the host has allowed it and the next one of a client is allowed when the one before was
acknowledged. So what can exist at an instant, and what must, is known by the host's clock without any tolerance.
"""

from __future__ import annotations

import bisect
import json
import shlex
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.debian import DebianGuest

__all__ = ["Bank", "Books", "opened"]

_CLIENTS = Path(__file__).with_name("bank_clients")

_SCHEMA = """
    create table accounts (id int primary key, balance bigint not null default 0, filler char(60) not null default '');
    create table tellers (id int primary key, balance bigint not null default 0);
    create table branches (id int primary key, balance bigint not null default 0);
    create table history (client int, number int, account int not null, teller int not null, branch int not null,
        delta int not null, filler text not null, primary key (client, number));
    create index on history (account);
    insert into accounts (id) select generate_series(1, 2000);
    insert into tellers (id) select generate_series(1, 40);
    insert into branches (id) select generate_series(1, 4);
"""

# Each kind of balance is held against the history, row by row; numbers without a hole are as many as their last one.
_UNEQUAL = """(select count(*) from {1} b where balance <> (select coalesce(sum(delta), 0) from history h
    where h.{0} = b.id))"""
_KINDS = (("account", "accounts"), ("teller", "tellers"), ("branch", "branches"))
_QUESTION = f"""
    set enable_indexonlyscan = off; set enable_bitmapscan = off; set enable_indexscan = off;
    select json_build_object(
        'clients', (select coalesce(json_object_agg(client, array[total, last]), '{{}}') from
            (select client, count(*) total, max(number) last from history group by client) each_client),
        'wrong', (select count(*) from history where filler <> repeat(md5(client || ' ' || number), 8)),
        'unequal', {" + ".join(_UNEQUAL.format(one, many) for one, many in _KINDS)},
        'rows', (select count(*) from accounts) + (select count(*) from tellers) + (select count(*) from branches));
"""

# Its own processes, System V memory and network: the guest's stale lock file must not name anybody of this machine.
_OPEN = r"""
set -eu
mount -o loop,noatime "$image" "$root"
trap 'umount -R "$root"' EXIT
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
mount -t tmpfs run "$root/tmp"
chmod 1777 "$root/tmp"
version=$(ls "$root/etc/postgresql")
programs=/usr/lib/postgresql/$version/bin
inside() { chroot "$root" setpriv --reuid postgres --regid postgres --init-groups env -i LC_ALL=C.UTF-8 "$@"; }
server() {
    inside "$programs/pg_ctl" -s -w -t 300 -D "/var/lib/postgresql/$version/main" -l /tmp/log "$@"
}
if ! server start -o "-c config_file=/etc/postgresql/$version/main/postgresql.conf -c listen_addresses= \
    -c unix_socket_directories=/tmp -c logging_collector=off -c log_destination=stderr"; then
    cat "$root/tmp/log" >&2
    exit 1
fi
inside "$programs/psql" -h /tmp -qAtX -v ON_ERROR_STOP=1 -c "$question" shop
inside "$programs/pg_amcheck" -h /tmp --no-dependent-toast --install-missing --heapallindexed -t 'public.*' shop >&2
server stop -m fast
cat "$root/tmp/log" >&2
"""


@dataclass(frozen=True, slots=True)
class Books:
    """What the database says. `clients`: how many transactions of each are in it, and the number of the last."""

    clients: dict[int, tuple[int, int]]
    wrong: int
    unequal: int
    rows: int
    recovered: bool
    log: str

    @property
    def whole(self) -> bool:
        """No transaction is there by half, none is missing before another one of its client, none is damaged."""
        return not self.wrong and not self.unequal and self.rows == 2044 and all(
            total == last for total, last in self.clients.values()
        )  # fmt: skip


class Bank:
    """Clients in the guest that go on until the context ends. One thread asks; the serial port's own one answers."""

    def __init__(self, guest: DebianGuest, clients: int) -> None:
        self._guest = guest
        self._clients = clients
        self._allowed: dict[int, list[float]] = {number: [] for number in range(1, clients + 1)}
        self._told: dict[int, list[float]] = {number: [] for number in range(1, clients + 1)}
        self._open = threading.Event()
        self._open.set()

    def __enter__(self) -> Bank:
        self._guest.sql(_SCHEMA)
        # Checkpoints while clients write: more than the log has to be right.
        self._guest.sql("alter system set checkpoint_timeout = '30s'", "postgres")
        self._guest.sql("select pg_reload_conf()", "postgres")
        script = shlex.quote(_CLIENTS.read_text())
        self._guest.run(f"printf %s {script} >/usr/local/sbin/bank && chmod 755 /usr/local/sbin/bank")
        self._guest.listen(self._hear)
        as_postgres = "-p User=postgres -p SupplementaryGroups=dialout"
        self._guest.run(f"systemd-run -q --unit bank {as_postgres} /usr/local/sbin/bank {self._clients}")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """No further transaction is allowed."""
        self._open.clear()

    @property
    def acknowledged(self) -> int:
        return sum(map(len, self._told.values()))

    def must(self, instant: float) -> dict[int, int]:
        """How many transactions of each client were acknowledged by then."""
        return {client: bisect.bisect_right(times, instant) for client, times in self._told.items()}

    def may(self, instant: float) -> dict[int, int]:
        """How many can exist then."""
        return {client: bisect.bisect_right(times, instant) for client, times in self._allowed.items()}

    def _hear(self, line: bytes) -> None:
        now = time.time()
        words = line.split()
        if words[:1] == [b"clients"]:
            for client in self._allowed:
                self._allow(client)
        elif words[:1] == [b"ack"] and len(words) == 3:
            client, number = int(words[1]), int(words[2])
            self._told[client].append(now)
            assert len(self._told[client]) == number, line
            self._allow(client)

    def _allow(self, client: int) -> None:
        if self._open.is_set():
            self._allowed[client].append(time.time())
            self._guest.say(b"%d %d\n" % (client, len(self._allowed[client])))


def opened(socket: Path, folder: Path) -> Books:
    """Mount the writable export `vda` that is served there, let PostgreSQL recover on it, and ask it.

    Raises RuntimeError with what everybody said when one of them cannot.
    """
    root = folder / "root"
    root.mkdir(exist_ok=True)
    with _as_file(socket, folder / "disk") as image:
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        settings = {"image": str(image), "root": str(root), "question": _QUESTION, "PATH": path}
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--ipc", "--net", "--fork", "--kill-child", "sh", "-c", _OPEN],
            env=settings, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the database does not open: {done.stdout}{done.stderr}")
    told = json.loads(done.stdout)
    return Books(
        {int(client): (total, last) for client, (total, last) in told["clients"].items()},
        told["wrong"], told["unequal"], told["rows"], "automatic recovery in progress" in done.stderr, done.stderr,
    )  # fmt: skip


@contextmanager
def _as_file(socket: Path, mountpoint: Path):
    """The export as a file that can be mounted by loop: nbdfuse makes a folder with one file in it."""
    mountpoint.mkdir(exist_ok=True)
    fuse = subprocess.Popen(["nbdfuse", mountpoint, f"nbd+unix:///vda?socket={socket}"])
    try:
        image = mountpoint / "nbd"
        until = time.monotonic() + 60
        while not image.exists():
            if fuse.poll() is not None or time.monotonic() > until:
                raise RuntimeError("nbdfuse serves nothing")
            time.sleep(0.02)
        yield image
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        try:
            fuse.wait(20)
        except subprocess.TimeoutExpired:
            fuse.kill()
            fuse.wait(10)
