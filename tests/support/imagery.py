"""A home with a client's two instants as points, a template, and `rewind image` as a person types it.

    with Imagery(folder, clients.build("mbr")) as imagery:
        built = imagery.build(TARGETS["nvme-vmxnet3-uefi"], "first", "esp")
        disk = imagery.disk("first", path)      an overlay whose backing file is the point, served by a view
        disks = imagery.disks("first", folder)  one for each of its disks

The client is a domain of libvirt that is shut off: its points are taken as any other's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from appliance.config import Home
from appliance.service import Session
from appliance.service.elsewhere import export
from tests.guests import packages
from tests.guests.clients import ORIGINS, ClientFiles
from tests.support import imagekit, libvirt
from tests.support.targets import Target

__all__ = ["Imagery"]

ROOT = Path(__file__).resolve().parents[2]

_DISK = {
    "mbr": '<target dev="vda" bus="virtio"/>',
    "cloud": '<target dev="vda" bus="virtio"/>',
    "dracut": '<target dev="sda" bus="scsi"/>',
}
_CONTROLLERS = {"mbr": "", "cloud": "", "dracut": '<controller type="scsi" index="0" model="virtio-scsi"/>'}


class Imagery:
    """`images` is a folder that libvirt's QEMU may read. Everything it starts ends with the context.

    The home with its two points is made once for each client and kept in the cache, but for what a home makes again by
    itself: taking them reads the whole disk twice.
    """

    def __init__(self, images: Path, client: ClientFiles) -> None:
        self.client, self.images = client, images
        self._label = getattr(client, "kind", client.name)
        self.name = f"client-{self._label}"
        # Always the same, since a home says where its repository is; in the private world nobody else has it.
        self.home = Path(tempfile.gettempdir()) / f"imagery-{self._label}"
        self.points: dict[str, str] = {}
        self._uri = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Imagery:
        self._uri = libvirt.start()
        digest = hashlib.sha256(f"1 {self.client.folder.name}".encode()).hexdigest()[:12]
        kept = packages.cached(f"imagery-{self._label}-{digest}", self._make)
        subprocess.run(["cp", "-a", kept / "home", self.home], check=True)
        self.points = json.loads((kept / "points.json").read_text())
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.home)
            self._define()
            stack.callback(libvirt.virsh, "undefine", self.name)
            for name in ("cache", "run", "log"):
                (self.home / name).mkdir(exist_ok=True)
            self._keep_template()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self, folder: Path) -> None:
        """The home and its points, by the program itself, of a domain that is shut off."""
        points = {}
        self.home.mkdir()
        try:
            self._put("first")
            self._define()
            self.rewind("init", "--repository", self.home / "repo")
            self.rewind("protect", self.name)
            for instant in self.client.expected:
                self._put(instant)
                (point,) = [one for one in self.rewind("point", self.name) if one["type"] == "point"]
                points[instant] = point["id"]
            libvirt.virsh("undefine", self.name)
            for name in ("cache", "run", "log"):
                shutil.rmtree(self.home / name)
            subprocess.run(["cp", "-a", self.home, folder / "home"], check=True)
            (folder / "points.json").write_text(json.dumps(points))
        finally:
            for disk in self._places("first"):
                disk.unlink(missing_ok=True)
            shutil.rmtree(self.home)

    def _sources(self, instant: str) -> tuple[Path, ...]:
        """A client of `tests.guests.roots` may have more than one."""
        several = getattr(self.client, "disks", None)
        return several(instant) if several else (self.client.disk(instant),)

    def _places(self, instant: str) -> list[Path]:
        return [self.images / f"{self.name}{number or ''}.qcow2" for number, _ in enumerate(self._sources(instant))]

    def _define(self) -> None:
        origin = ORIGINS[self.client.name]
        model = "e1000" if "e1000" in origin.nic else "virtio"
        machine = {"pc": "pc", "q35": "q35"}[origin.machine]
        libvirt.virsh("define", self._xml(self._places("first"), machine, model, origin.mac))

    def _xml(self, places: list[Path], machine: str, model: str, mac: str) -> Path:
        first = _DISK[self.client.name]
        disks = "".join(
            f'<disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="{path}"/>'
            f"{first.replace('vda', f'vd{letter}')}</disk>"
            for path, letter in zip(places, "ab", strict=False)
        )
        text = f"""<domain type="qemu"><name>{self.name}</name><memory unit="MiB">768</memory>
        <os><type arch="x86_64" machine="{machine}">hvm</type></os><devices>
        {_CONTROLLERS[self.client.name]}
        {disks}
        <interface type="user"><mac address="{mac}"/><model type="{model}"/></interface>
        <serial type="pty"/></devices></domain>"""
        path = self.home / "client.xml"
        path.write_text(text)
        return path

    def _put(self, instant: str) -> None:
        """The disks in that state, as whole new images: what a restore from elsewhere looks like."""
        for disk, source in zip(self._places(instant), self._sources(instant), strict=True):
            disk.unlink(missing_ok=True)
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", source, disk], check=True)
            os.chmod(disk, 0o666)

    def _keep_template(self) -> None:
        from appliance.service.image.shelf import Shelf
        from images.template import pack

        made, file = imagekit.template(), self.home / "template"
        pack.pack(made, file)
        with self.session() as session:
            (session.home.cache / "templates").mkdir(parents=True)
            subprocess.run(["cp", "-a", made.folder, session.home.cache / "templates" / made.id], check=True)
            Shelf(session, "templates").put(made.id, made.manifest.model_dump(mode="json"), file)
        file.unlink()

    def rewind(self, *words: object, code: int = 0, timeout: float = 300) -> list[dict[str, Any]]:
        """The lines of one call of the program."""
        base = [sys.executable, "-m", "appliance.cli", "--home", str(self.home), "--connect", self._uri, "--json"]
        done = subprocess.run(
            [*base, *map(str, words)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return [json.loads(line) for line in done.stdout.splitlines()]

    def session(self) -> Session:
        return Session(Home(self.home), self._uri)

    def add_target(self, target: Target, *more: str) -> None:
        """As QEMU's command line, with the disk where the restored one will be; `more` words of it."""
        with tempfile.NamedTemporaryFile("w", suffix=".cmd") as file, tempfile.TemporaryDirectory() as scratch:
            words = ["qemu-system-x86_64", *target.hardware(Path(scratch)), "-m", "768"]
            words += [*target.disk_args(Path("/dev/null")), *target.nic_args(), "-serial", "null", *more]
            file.write(shlex.join(str(word) for word in words))
            file.flush()
            self.rewind("image", "target", "add", target.name, "--qemu", file.name, "--replace")

    def plan(self, target: Target, instant: str) -> dict[str, Any]:
        (line,) = self.rewind("image", "plan", self.name, "--at", self.points[instant], "--target", target.name)
        return line

    def build(self, target: Target, instant: str, media: str, folder: Path, *more: str) -> dict[str, Any]:
        words = ("image", "build", self.name, "--at", self.points[instant], "--target", target.name)
        (line,) = self.rewind(*words, "--media", media, "--into", folder, *more)
        return line

    @contextlib.contextmanager
    def disks(self, instant: str, folder: Path):
        """As `disk`, for all of them: a new overlay in `folder` for each, in their order."""
        with self.session() as session, export(session, self.name, self.points[instant]) as served:
            paths = []
            for one in served.disks:
                paths.append(folder / f"{one.disk}.qcow2")
                words = ["-b", one.uri, "-F", "raw", paths[-1], str(one.size)]
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words], check=True)
            yield paths

    @contextlib.contextmanager
    def disk(self, instant: str, path: Path):
        """A new overlay at `path` over the point, which is served meanwhile and cannot be written."""
        with self.session() as session, export(session, self.name, self.points[instant]) as served:
            (one,) = served.disks
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", one.uri, "-F", "raw", path, str(one.size)], check=True
            )
            yield path
