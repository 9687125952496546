"""Places that keep objects, by URL.

    /srv/rewind, file:///srv/rewind                     a folder
    s3://BUCKET[/PREFIX]?endpoint=URL&region=NAME…      a bucket of any S3-compatible store; see s3.py for the options
    memory://NAME                                       this process only, gone with it

Objects are immutable: create-only put, get of a range, delete, list, stat. Wrappers are backends too (wrap.py).
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from appliance.errors import ConfigError
from appliance.store.backend.base import Backend, Capabilities, ObjectInfo

__all__ = ["Backend", "Capabilities", "ObjectInfo", "open_backend"]


def open_backend(url: str) -> Backend:
    """The backend of that URL, which makes nothing and asks nothing before the first call.

    It tries again what is worth another try, and a put that finds exactly its own content there succeeds (see
    wrap.Retrying).

    Raises ConfigError for a URL that makes no sense.
    """
    from appliance.store.backend.wrap import Retrying

    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        from appliance.store.backend.local import LocalBackend

        # A second and a half: a network file system may recover, a broken disk does not, and somebody is waiting.
        return Retrying(LocalBackend(_folder(url) if separator else Path(url)), attempts=5)
    if scheme == "s3":
        from appliance.store.backend.ahead import ReadingAhead
        from appliance.store.backend.s3 import S3Backend

        return ReadingAhead(Retrying(S3Backend.from_url(url)))
    if scheme == "memory":
        from appliance.store.backend.memory import MemoryBackend

        return Retrying(MemoryBackend(rest))
    raise ConfigError(reason=f"no backend for {url!r}", hint="a folder, s3://BUCKET/PREFIX or memory://NAME")


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ConfigError(reason=f"not a local folder: {url!r}", hint="file:///FOLDER")
    return Path(unquote(parts.path))
