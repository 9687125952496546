"""Boots a client by its image until its steps are done, or until the power is to be cut.

    console = settle(target, disk, medium, folder)              to the end of the settling phase
    console = settle(..., until=r"rewind: initramfs: the disk")  the power is cut when the console shows this
    assert ("loader", "done") in said(console)

QEMU is killed in every case: what the guest has in its memory only is lost, as by a power cut.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from images.build import Built, build_image
from images.drivers.plan import Options, make_plan
from images.drivers.tables import tables_from_folder, tables_from_tree
from images.guest import open_guest
from images.hardware import from_qemu
from images.settle.choice import After, with_steps
from tests.support import imagekit
from tests.support.imageproof import arguments
from tests.support.limits import limit
from tests.support.targets import Medium, Target

__all__ = ["UNPACK", "build", "said", "secure", "settle", "tools"]

_OVMF = Path("/usr/share/OVMF")
_END = r"rewind: settle: (done|not all)"
# A step that brings programs along which a client is built without.
UNPACK = b"tar -C / -xf /run/rewind/tools.tar && say unpacked"


def settle(
    target: Target, disk: Path, medium: Medium, folder: Path, *, seconds: float = 600, until: str = "",
    after: float = 0, secured: bool = False,
) -> str:  # fmt: skip
    """The console. Ended `after` seconds after it has shown `until`. `secured`: with Secure Boot."""
    folder.mkdir()
    if secured:
        shutil.copy(_OVMF / "OVMF_VARS_4M.ms.fd", folder / "OVMF_VARS.fd")
    command = arguments(target, disk, medium, folder)
    if secured:
        command = secure(command)
    console = folder / "console.log"
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + limit(seconds)
        while process.poll() is None and time.monotonic() < deadline:
            if re.search(f"{_END}|{until}" if until else _END, _text(console)):
                time.sleep(after)
                break
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait(30)
    return _text(console)


def said(console: str) -> list[tuple[str, str]]:
    """(step, sentence) of all that the steps told."""
    return re.findall(r"rewind: (\S+): (.*?)\r?\n", console)


def secure(command: Sequence[str]) -> list[str]:
    """The same machine with firmware that starts only what Microsoft's keys have signed."""
    found = [str(word).replace("OVMF_CODE_4M.fd", "OVMF_CODE_4M.ms.fd") for word in command]
    found[found.index("-machine") + 1] += ",smm=on"
    return [*found, "-global", "driver=cfi.pflash01,property=secure,value=on"]


def tools(path: Path, *names: str) -> bytes:
    """Programs and folders of this machine, which has the client's release, for `UNPACK`: what the packages
    grub-efi-amd64-bin, dosfstools and fdisk would have put there."""
    needed = subprocess.check_output(["ldd", "/usr/sbin/sfdisk"], text=True)
    libraries = re.findall(r"=> /(?:usr/)?(lib/\S*/lib(?:fdisk|readline)\.so\.\d+) ", needed)
    files = [f"usr/{one}" for one in (*names, *libraries)]
    subprocess.run(["tar", "-C", "/", "--dereference", "--hard-dereference", "-cf", path, *files], check=True)
    return path.read_bytes()


def build(
    disk: Path, target: Target, after: After, media: str, folder: Path, *, secured: bool = False
) -> Built:  # fmt: skip
    """The image of a client whose disk is at hand, without a repository."""
    words = ["qemu-system-x86_64", *target.hardware(folder), "-m", "768", *target.disk_args(Path("/dev/null"))]
    inventory = from_qemu([*words, *target.nic_args(), "-serial", "null"], target=target.name)
    inventory = inventory.model_copy(update={"secure_boot": secured})
    template = imagekit.template()
    with open_guest({"vda": f"qcow2:{disk}"}, folder) as guest:
        client = guest.client
        options = Options(identifiers=frozenset(f"UUID={one.uuid}" for one in guest.volumes if one.uuid))
        tables = tables_from_tree(guest.tree, client.modules)
        made = make_plan(client, tables, inventory, tables_from_folder(template.modules), options=options)
        made, settings = with_steps(made, after, "seed")
        return build_image(
            made, guest.tree, template, media=[media], folder=folder / "image", settings=settings
        )  # fmt: skip


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
