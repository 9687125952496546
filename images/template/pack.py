"""A template as one file, the same bytes for the same template: a tar archive in one zstd frame.

`manifest.json` is its first member. Members are sorted, owned by root and of the time 0.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import zstandard

from appliance.errors import ImageError, TargetExists
from appliance.scratch import scratch_folder
from images.template.build import Template, files_of, load_template

__all__ = ["pack", "unpack"]

_LEVEL = 6
# More than a kernel with all its modules will be for long; a bound for what a damaged file can make us write.
_LARGEST = 4 << 30


def pack(template: Template, file: Path) -> None:
    """Write the template to `file`. After a failure there is no file."""
    try:
        with file.open("wb") as raw, zstandard.ZstdCompressor(level=_LEVEL).stream_writer(raw, closefd=False) as stream:
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                for path in (template.folder / "manifest.json", *files_of(template.folder)):
                    _add(archive, str(path.relative_to(template.folder)), path)
            stream.flush(zstandard.FLUSH_FRAME)
            raw.flush()
            os.fsync(raw.fileno())
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def unpack(file: Path, folder: Path) -> Template:
    """The template in `file`, unpacked as `folder`, which must not exist. Raises TargetExists, and ImageError when the
    file is no template or its content is not that of its id; nothing is left then."""
    if folder.exists():
        raise TargetExists(path=folder)
    with scratch_folder(folder.parent, f".{folder.name}-") as scratch:
        _extract(file, scratch)
        template = load_template(scratch, check=True)
        scratch.chmod(0o755)
        os.rename(scratch, folder)
    return Template(folder, template.manifest)


def _add(archive: tarfile.TarFile, name: str, path: Path) -> None:
    data = path.read_bytes()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
    archive.addfile(member, io.BytesIO(data))


def _extract(file: Path, folder: Path) -> None:
    left = _LARGEST
    with _reading(file) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isreg() or path.is_absolute() or ".." in path.parts:
                raise ImageError(reason=f"template file {file} has a member that no template has: {member.name!r}")
            left -= member.size
            if left < 0:
                raise ImageError(reason=f"template file {file} has more than {_LARGEST} bytes")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None  # a regular member has content
            with target.open("xb") as out:
                shutil.copyfileobj(source, out)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)


@contextmanager
def _reading(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with (
            file.open("rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            yield archive
    except (zstandard.ZstdError, tarfile.TarError, FileExistsError, EOFError) as error:
        raise ImageError(reason=f"template file {file} is damaged: {error}") from error
