"""A client so small that it streams in seconds: one ext4 on a partition, an init that works on it until it is alone.

    with Source(folder) as source:
        image = source.image(folder / "image")               a medium, and the session that serves it
        machine = source.machine(image, folder / "run1")     boots it on a machine with an empty disk
        machine.wait_for(r"alone")

The init keeps writing files and says of each `wrote NAME MD5` once it is on the disk; it ends with `end` when its disk
is its own, and on every start says `found NAME MD5` of all that it finds.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from appliance import nbd
from appliance.config import Home
from appliance.restore import control, streams
from appliance.restore.export import ViewServer
from appliance.service import Session
from appliance.service.setup import init
from appliance.units import CHUNK
from images.build import build_image
from images.model import Firmware
from images.stream.layout import Disk, Layout, Part
from images.stream.settings import MODULES, Stream, with_stream
from images.stream.tls import Certificates, make_certificates
from images.template.settings import Settings
from tests.support import imagekit
from tests.support.limits import limit

__all__ = ["DISK_BYTES", "Machine", "Source"]

DISK_BYTES = 96 << 20
_ROOT_OFFSET, _ROOT_BYTES = 1 << 20, 48 << 20
# Random bytes that have to come over, so that filling takes a while.
_WEIGHT_OFFSET, _WEIGHT_BYTES = 56 << 20, 24 << 20

_INIT = r"""#!/bin/busybox sh
exec >/dev/ttyS1 2>&1
export PATH=/bin
/bin/busybox mount -o remount,rw / || echo "remount: failed"
/bin/busybox --install -s /bin
echo "root: $(grep ' / ' /proc/mounts | tail -n 1)"
for nic in /sys/class/net/*; do echo "nic: ${nic##*/}"; done
mkdir -p /data
for file in /data/*; do [ ! -f "$file" ] || echo "found ${file##*/} $(md5sum <"$file" | cut -d' ' -f1)"; done
echo up
touch /run/rewind/booted 2>/dev/null
number=$(ls /data | wc -l)
least=$((number + 3))
while [ "$number" -lt "$least" ] || [ ! -e /run/rewind/gone ]; do
    number=$((number + 1))
    dd if=/dev/urandom of=/data/$number bs=16k count=4 2>/dev/null && sync || echo "write of $number: failed"
    sum=$(md5sum </data/$number | cut -d' ' -f1)
    echo "wrote $number $sum"
    [ "$number" -lt 60 ] || sleep 2
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(md5sum </data/$number | cut -d' ' -f1)" = "$sum" ] || echo "read of $number: another content"
    sleep 0.3
done
dmesg | grep -E 'EXT4-fs (error|warning)|Buffer I/O error on dev dm|Remounting' | sed 's/^/trouble: /'
for one in /dev/mapper/*; do echo "map: ${one##*/}"; done
ip -4 -o addr | sed 's/^/address: /'
sync
echo end
poweroff -f
"""


def _disk(folder: Path) -> Path:
    """The client's disk with its partition table."""
    root, disk = folder / "root", folder / "disk.raw"
    shutil.copytree(imagekit.client().root, root, symlinks=True)
    shutil.rmtree(root / "usr")
    shutil.rmtree(root / "boot")
    (root / "sbin/init").write_text(_INIT)
    (root / "sbin/init").chmod(0o755)
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    part = f"start={_ROOT_OFFSET // 512}, size={_ROOT_BYTES // 512}, type=83\n"
    subprocess.run(["sfdisk", "-q", disk], input=f"label: dos\n{part}", text=True, check=True)
    options = f"offset={_ROOT_OFFSET},no_copy_xattrs"
    command = ["mke2fs", "-q", "-t", "ext4", "-U", imagekit.UUID, "-E", options, "-d", root, disk]
    subprocess.run([*command, f"{_ROOT_BYTES >> 10}k"], check=True, capture_output=True)
    with disk.open("r+b") as file, Path("/dev/urandom").open("rb") as noise:
        file.seek(_WEIGHT_OFFSET)
        file.write(noise.read(_WEIGHT_BYTES))
    return disk


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Source:
    """A repository with the client's disk, and one session of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = _disk(folder)
        self.home = Home(Path(tempfile.mkdtemp(prefix="rws")))
        self.order: streams.Order | None = None

    def __enter__(self) -> Source:
        with Session(self.home) as session:
            init(session)
            self.spec = session.spec
        data = self.disk.read_bytes()
        with self.spec.open() as repo, repo.writer() as writer:
            pieces = {at // CHUNK: data[at : at + CHUNK] for at in range(0, len(data), CHUNK)}
            changes = [(index, writer.put(piece)) for index, piece in pieces.items() if any(piece)]
            self.map = repo.write_map(None, len(data), changes, writer)
        return self

    def __exit__(self, *_: object) -> None:
        if self.order is not None:
            streams.tidy(self.home, self.order.name)
        shutil.rmtree(self.home.path, ignore_errors=True)

    def serve(self, mode: str = "stream", image: str = "") -> Certificates:
        """A session, whose server has greeted."""
        session = f"rewind-{uuid.uuid4().hex[:16]}"
        certificates = make_certificates(session)
        self.order = streams.Order(
            "tiny", session, str(uuid.uuid4()), "point", "target", self.spec.to_json(), {"vda": self.map}, "127.0.0.1",
            free_port(), True, mode, image,
        )  # fmt: skip
        where = streams.prepare(self.home, self.order, certificates.server)
        control.create(where / control.CONTROL, {"vda": self._extents()} if mode == "copy" else {})
        streams.launch(self.home, self.order)
        return certificates

    def image(self, folder: Path, mode: str = "stream", **options) -> Path:
        """An ISO, and the session that it belongs to."""
        certificates, order = self.serve(mode, str(folder)), self.order
        assert order is not None
        root = Part("vda1", 1, _ROOT_OFFSET, _ROOT_BYTES)
        layout = Layout((Disk("vda", DISK_BYTES, (root,)),), "/dev/mapper/rewind-vda1")
        told = {"own": "10.0.2.16/24", "timeout": 10, "region": 1024, **options}
        stream = Stream(order.session, "10.0.2.2", order.port, layout, mode, tls=certificates.client, **told)
        client = imagekit.client()
        plan = imagekit.plan(client, imagekit.inventory(Firmware.BIOS), "nvme", "e1000e", "nbd", *MODULES)
        settings = with_stream(Settings(linger_seconds=2), stream)
        built = build_image(
            plan, client.tree(), imagekit.template(), media=["iso"], folder=folder, settings=settings
        )  # fmt: skip
        return built.files["iso"]

    def _extents(self):
        with ViewServer(self.home.path / "run", self.spec, {"vda": self.map}) as view:
            with nbd.connect(view.socket, "vda") as disk:
                return disk.extents(0, disk.size())

    def state(self) -> dict:
        return streams.state(self.home, "tiny")

    def record(self) -> control.Record:
        return control.read_record(streams.folder(self.home, "tiny") / control.CONTROL)

    def local(self, size: int = DISK_BYTES + (8 << 20)) -> Path:
        """An empty disk for a machine."""
        path = self.folder / f"local-{uuid.uuid4().hex[:8]}.raw"
        with path.open("wb") as file:
            file.truncate(size)
        return path


class Machine:
    """QEMU with an NVMe disk and a card that reaches this host. `kill` is a power cut."""

    def __init__(self, iso: Path, disk: Path, folder: Path, *arguments: str) -> None:
        folder.mkdir()
        self.console_file, self.proof_file = folder / "console.log", folder / "proof.log"
        command = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-m", "512", "-smp", "2"]
        command += ["-nodefaults", "-display", "none", "-no-reboot"]
        command += ["-serial", f"file:{self.console_file}", "-serial", f"file:{self.proof_file}"]
        command += ["-drive", f"if=none,id=root,format=raw,file={disk}", "-device", "nvme,drive=root,serial=local1"]
        command += ["-netdev", "user,id=net", "-device", f"e1000e,netdev=net,mac={imagekit.MAC},romfile="]
        command += ["-drive", f"if=none,id=boot,format=raw,readonly=on,file={iso}"]
        command += ["-device", "ide-cd,drive=boot,bus=ide.1,bootindex=0", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def console(self) -> str:
        return _text(self.console_file)

    @property
    def proof(self) -> str:
        return _text(self.proof_file)

    def wait_for(self, pattern: str, seconds: float = 120, where: str = "proof") -> None:
        """Until the proof or the console has it. Raises AssertionError with the console when the machine ends, or has
        nothing to say for too long."""
        deadline = time.monotonic() + limit(seconds)
        while not re.search(pattern, getattr(self, where), re.MULTILINE):
            ended = self._process.poll() is not None
            if ended and re.search(pattern, getattr(self, where), re.MULTILINE):
                return
            assert not ended and time.monotonic() < deadline, f"no {pattern!r}:\n{self.console[-6000:]}\n{self.proof}"
            time.sleep(0.2)

    def wait(self, seconds: float = 120) -> None:
        """Until it is off."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit(seconds))
        assert self._process.poll() == 0, f"it does not end:\n{self.console[-6000:]}\n{self.proof}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)

    def hold(self) -> None:
        """It does nothing any more, as a machine whose hypervisor has paused it."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `hold`, as if nothing had been."""
        self._process.send_signal(signal.SIGCONT)

    def said(self, word: str) -> dict[str, str]:
        """`word NAME MD5` lines as a dict."""
        return dict(re.findall(rf"^{word} (\S+) (\S+)$", self.proof, re.MULTILINE))


def _text(path: Path) -> str:
    return path.read_text(errors="replace").replace("\r", "") if path.exists() else ""
