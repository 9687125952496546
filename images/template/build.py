"""A template: everything of an image that can be made before somebody asks for one.

    manifest.json      id, time, kernel release, packages with versions
    vmlinuz, config    Debian's kernel: the default, which a build replaces by the client's own
    modules/           its modules and their tables, as under /lib/modules/RELEASE
    userland/          our own initrd without modules and settings (userland.py)
    loaders/           the boot loaders of the media (loaders.py)

A template is a folder. Its id is a digest of what is in it, so it changes with the content and with nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.errors import ImageError, NoSuchTemplate, TargetExists
from appliance.process import run
from images.template import apt, loaders, userland

__all__ = ["DEFAULT_KERNEL", "Manifest", "Template", "build_template", "content_id", "files_of", "load_template"]

DEFAULT_KERNEL = "linux-image-amd64"
_MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What `manifest.json` says. `created` in seconds since 1970; `packages` name to version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(default=1, ge=1, le=1)
    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    created: float = Field(ge=0)
    release: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+~_-]*$")
    packages: dict[str, str]


@dataclass(frozen=True, slots=True)
class Template:
    """A template that lies in `folder`. Any thread may share it; nobody changes the folder."""

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def created(self) -> float:
        return self.manifest.created

    @property
    def release(self) -> str:
        """Of the default kernel."""
        return self.manifest.release

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The default kernel's modules: the folder with `modules.alias` and `kernel/`."""
        return self.folder / "modules"

    @property
    def userland(self) -> Path:
        return self.folder / "userland"

    @property
    def loaders(self) -> Path:
        return self.folder / "loaders"


def build_template(folder: Path, *, kernel: str | Path = DEFAULT_KERNEL) -> Template:
    """Make a template in `folder`, which must not exist. Some minutes, and a download of some 150 MB.

    `kernel`: a Debian package by name, which is downloaded; a .deb file; or a root folder (`/`) whose newest kernel is
    taken. Raises TargetExists, ImageError, ToolFailed; nothing is left then.
    """
    if folder.exists():
        raise TargetExists(path=folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = scratch / "template"
        made.mkdir(mode=0o755)
        packages = _fill(made, kernel, scratch)
        release = _settle_kernel(made)
        manifest = Manifest(id=content_id(made), created=time.time(), release=release, packages=packages)
        (made / _MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
        os.rename(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Template(folder, manifest)


def load_template(folder: Path, *, check: bool = False) -> Template:
    """The template in a folder; with `check` its content is read and compared with its id. Raises NoSuchTemplate, and
    ImageError when it is damaged."""
    try:
        manifest = Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NoSuchTemplate(template_name=folder.name, called=repr(folder.name)) from None
    except (ValidationError, json.JSONDecodeError) as error:
        raise ImageError(reason=f"template {folder.name!r} has a damaged {_MANIFEST}: {error}") from error
    if check and content_id(folder) != manifest.id:
        raise ImageError(reason=f"template {folder.name!r} is damaged: its content is not that of {manifest.id}")
    return Template(folder, manifest)


def content_id(folder: Path) -> str:
    """16 digits that change with the name, mode or content of any file but the manifest."""
    digest = hashlib.sha256()
    for path in files_of(folder):
        mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
        data = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder)}\0{mode:o}\0{data}\n".encode())
    return digest.hexdigest()[:16]


def files_of(folder: Path) -> Iterator[Path]:
    """All files of a template but its manifest, in one order. A template has no links."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / _MANIFEST:
            yield path


def _fill(made: Path, kernel: str | Path, scratch: Path) -> dict[str, str]:
    """Everything but the manifest; versions of the packages it came from."""
    root = scratch / "root"
    packages = apt.with_libraries(userland.PACKAGES, root)
    userland.collect(root, made / "userland")
    for archive in apt.download(loaders.PACKAGES, scratch / "loaders"):
        packages.append(apt.unpack(archive, root))
    loaders.collect(root, made / "loaders")
    found = {package.name: package.version for package in packages}
    source, named = _kernel_root(kernel, scratch)
    _take_kernel(source, made)
    return found | named


def _kernel_root(kernel: str | Path, scratch: Path) -> tuple[Path, dict[str, str]]:
    if isinstance(kernel, Path) and kernel.is_dir():
        return kernel, {}
    if isinstance(kernel, Path):
        archive = kernel
    else:
        # `linux-image-6.1.0-50-amd64` is a kernel; `linux-image-amd64` only names one.
        name = kernel if re.match(r"linux-image-\d", kernel) else apt.meant_by(kernel)
        (archive,) = apt.download([name], scratch / "kernel")
    package = apt.unpack(archive, scratch / "kernel-root")
    return scratch / "kernel-root", {package.name: package.version}


def _take_kernel(root: Path, made: Path) -> None:
    kernels = sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    if not kernels:
        raise ImageError(reason=f"there is no kernel in {root / 'boot'}")
    release = kernels[-1].name.removeprefix("vmlinuz-")
    modules = [path for path in (root / "usr/lib/modules" / release, root / "lib/modules" / release) if path.is_dir()]
    if not modules:
        raise ImageError(reason=f"kernel {release} in {root / 'boot'} has no modules beside it")
    shutil.copyfile(kernels[-1], made / "vmlinuz")
    if (root / "boot" / f"config-{release}").is_file():
        shutil.copyfile(root / "boot" / f"config-{release}", made / "config")
    shutil.copytree(modules[0], made / "modules", ignore=shutil.ignore_patterns("build", "source"))
    (made / "release").write_text(release + "\n")


def _settle_kernel(made: Path) -> str:
    """Its tables (a package has none before it is installed), in text only: nobody here reads the binary ones."""
    release = (made / "release").read_text().strip()
    base = made / "depmod/lib/modules"
    base.mkdir(parents=True)
    os.rename(made / "modules", base / release)
    run(["depmod", "-b", made / "depmod", release])
    os.rename(base / release, made / "modules")
    shutil.rmtree(made / "depmod")
    for table in (made / "modules").glob("modules.*.bin"):
        table.unlink()
    return release
