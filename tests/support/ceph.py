"""A real S3 store for tests: one Ceph of one monitor, one OSD in memory and one gateway, without systemd.

Everything is below one folder, on ports of 127.0.0.1 that nobody is given by chance; the daemons are our children and
die with us. Needs Debian's packages `ceph-mon ceph-osd radosgw ceph-common` and root or any user.

    with Ceph(folder) as ceph:
        ceph.endpoint, ceph.environment, ceph.bucket("name")
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from appliance.process import Child, run

TOOLS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin")
PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"

# cephx stays on: with `auth none` the gateway hangs for minutes. The monitor waits a second before each change, which
# makes 15 seconds of start out of two. Without tcp_nodelay small answers come 40 ms late. The cache of a gateway that
# was killed is still told of every change of users, for half a minute.
CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]
public addr = 127.0.0.1
keyring = {folder}/keyring
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
crash dir = {folder}/crash
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
paxos propose interval = 0.05
paxos min wait = 0.01
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {memory}
osd class update on start = false
osd class dir = {classes}
erasure code dir = {classes}/../ceph/erasure-code
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{http} tcp_nodelay=1
rgw thread pool size = 32
rgw data = {folder}/rgw
rgw run sync thread = false
rgw enable usage log = false
rgw cache enabled = false
rgw gc obj min wait = 1
rgw gc processor period = 2
"""


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


class Ceph:
    """Running while the context lasts. `folder` must be short (socket paths) and empty; it is removed at the end."""

    access_key = "rewindtest"
    secret_key = "rewindtestsecret"

    def __init__(self, folder: Path, memory: int = 2 << 30) -> None:
        self.folder = folder
        self.http, self.mon1, self.mon2 = _free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.http}"
        self._memory = memory
        self._children: list[Child] = []

    def __enter__(self) -> Ceph:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What boto3's usual chain finds the credentials in."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def client(self, access_key=access_key, secret_key=secret_key):
        """A plain boto3 client, for what the backend does not do: making buckets, looking behind its back."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="default",
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    def bucket(self, name: str, **options) -> str:
        """Make a bucket; its name (three characters or more)."""
        self.client().create_bucket(Bucket=name, **options)
        return name

    def stop(self) -> None:
        for child in reversed(self._children):
            child.kill()  # nothing in it is worth an orderly end
        self._children.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def gateway(self) -> Child:
        """For tests that stop, kill or restart it."""
        return self._children[-1]

    def restart_gateway(self) -> None:
        """After its death, on the same port."""
        self._children.pop().kill()
        self._daemon("radosgw", *self._gateway_options())
        self._wait_for_http()

    def make_user(self, name: str, *options: str) -> dict[str, str]:
        """A user and its credentials, as environment variables."""
        keys = ["--access-key", f"{name}-access", "--secret-key", f"{name}-secret"]
        self.admin("user", "create", f"--uid={name}", f"--display-name={name}", *keys, *options)
        return {**self.environment, "AWS_ACCESS_KEY_ID": f"{name}-access", "AWS_SECRET_ACCESS_KEY": f"{name}-secret"}

    def admin(self, *arguments: str) -> str:
        """radosgw-admin; its output."""
        return run(["radosgw-admin", *self._gateway_options(), *arguments], timeout=60)

    def _gateway_options(self) -> list[str]:
        return ["-n", "client.rgw", "-k", str(self._keyring), "-c", str(self._conf)]

    def _start(self) -> None:
        for name in ("mon", "osd", "rgw", "crash"):
            (self.folder / name).mkdir(parents=True)
        self._conf = self.folder / "ceph.conf"
        self._keyring = self.folder / "keyring"
        self._fsid = str(uuid.uuid4())
        # Debian 13's Ceph looks for its classes relative to the working folder.
        classes = next(Path("/usr/lib").glob("*/rados-classes"))
        ports = {"http": self.http, "mon1": self.mon1, "mon2": self.mon2}
        values = {"fsid": self._fsid, "folder": self.folder, "memory": self._memory, "classes": classes}
        self._conf.write_text(CONF.format(**values, **ports))
        self._start_monitor()
        self._start_osd()
        self._start_gateway()

    def _start_monitor(self) -> None:
        keys = ["ceph-authtool", self._keyring]
        run([*keys, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])
        for name in ("client.admin", "osd.0", "client.rgw"):
            run([*keys, "--gen-key", "-n", name, "--cap", "mon", "allow *", "--cap", "osd", "allow *"])
        addresses = f"[v2:127.0.0.1:{self.mon2},v1:127.0.0.1:{self.mon1}]"
        monmap = self.folder / "monmap"
        run(["monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", addresses, monmap])
        run(["ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", self._keyring, "-c", self._conf])
        self._daemon("ceph-mon", "-i", "a")

    def _start_osd(self) -> None:
        osd = str(uuid.uuid4())
        run(["ceph", "-c", self._conf, "--connect-timeout", "30", "osd", "new", osd], timeout=40)
        run(["ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "-c", self._conf])
        self._daemon("ceph-osd", "-i", "0")

    def _start_gateway(self) -> None:
        keys = ["--access-key", self.access_key, "--secret-key", self.secret_key]
        self.admin("user", "create", "--uid=t", "--display-name=t", *keys)
        self._daemon("radosgw", *self._gateway_options())
        self._wait_for_http()

    def _daemon(self, program: str, *arguments: object) -> None:
        argv = [program, "-f", *map(str, arguments)]
        if program != "radosgw":
            argv += ["-c", str(self._conf)]
        self._children.append(Child(argv, name=program, log=self.folder / f"{program}.out"))

    def _wait_for_http(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for child in self._children:
                if not child.alive():
                    raise RuntimeError(f"{child.name} ended: {child.tail()}")
            with contextlib.suppress(OSError):
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(self.endpoint, timeout=5).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"the gateway did not answer within {seconds:.0f} s: {self._children[-1].tail()}")


def _free_ports(count: int) -> list[int]:
    """Bound seconds later, so not from the kernel's own range (32768 and more), out of which any client gets one."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            ports.add(port)
    return list(ports)
