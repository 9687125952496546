"""Objects in a bucket of any S3-compatible store: s3://BUCKET[/PREFIX]?OPTION=VALUE&…

    endpoint=URL         of a store that is not Amazon's: http://rgw.example:7480
    region=NAME          else what boto3 finds in its settings, else us-east-1
    profile=NAME         of ~/.aws/config and ~/.aws/credentials
    credentials=FILE     a file in that format, in another place
    style=path|virtual   where the bucket's name goes; path when an endpoint is given
    ca=FILE              certificates to trust
    retain=30d           object lock: the store refuses to delete a version before that time is over
    retain-mode=MODE     compliance (nobody can, the default) or governance (who has the special permission can)

The time of an object lock counts from the put and is not prolonged. What younger points share with older ones is only
as safe as its own age, so choose it longer than the longest rule by which points are kept.

Credentials come by boto3's usual ways (environment, files, instance role) and never from the URL, which ends up in
process lists, settings and messages.

Creation is exclusive by `If-None-Match: *`. Stores that do not know it overwrite without a word, so the first put of
a process proves it on an object of its own; where it fails, put asks before it writes and capabilities() tells that
a race can be lost. botocore's own retries are off: they would meet the object that the lost first try had written
and report it as somebody else's. Wrap it in Retrying.

A Ceph gateway without `tcp_nodelay=1` in `rgw frontends` answers small requests 40 ms late.
"""

from __future__ import annotations

import io
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from appliance.errors import (
    AlreadyExists,
    ConfigError,
    NoSpace,
    ObjectNotFound,
    PermissionDenied,
    RepositoryNotFound,
    RewindError,
    StoreError,
    Temporary,
)
from appliance.store.backend.base import Buffer, Capabilities, ObjectInfo, check_name, check_prefix, is_name
from appliance.units import parse_duration

__all__ = ["S3Backend", "S3Place"]

# A host that does not answer is noticed before a guest's patience ends; a 32 MiB pack may take its time.
CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 30
# More threads than connections wait; view and intake use 16 at most.
CONNECTIONS: Final = 32

_OPTIONS = ("ca", "credentials", "endpoint", "profile", "region", "retain", "retain-mode", "style")
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{2,254}")
_PREFIX = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9._-]*(/[a-zA-Z0-9_-][a-zA-Z0-9._-]*)*")
# Holders refresh their locks for ever and remove them: each kept version would only cost space.
_NOT_RETAINED = "locks/"

# Codes of the store or HTTP statuses, which stand alone in answers without a body. The first line that fits holds.
_KINDS: tuple[tuple[type[StoreError], frozenset[str]], ...] = (
    (RepositoryNotFound, frozenset({"NoSuchBucket"})),
    (ObjectNotFound, frozenset({"NoSuchKey", "NotFound", "404"})),
    (AlreadyExists, frozenset({"PreconditionFailed", "412"})),
    (NoSpace, frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "EntityTooLarge", "507"})),
    (Temporary, frozenset({"RequestTimeout", "SlowDown", "OperationAborted", "408", "409", "429"})),
    (PermissionDenied, frozenset({"ExpiredToken", "TokenRefreshRequired", "InvalidToken", "401", "403", "405"})),
)
_HINTS = {
    "NoSuchBucket": "make the bucket first: its settings (versions, object lock, quota) are yours to choose",
    "RequestTimeTooSkewed": "set this machine's clock: the store accepts a few minutes of difference",
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key, or a proxy changes requests",
    "ExpiredToken": "get new temporary credentials",
    "AuthorizationHeaderMalformed": "name the bucket's own region by region=NAME",
    "PermanentRedirect": "name the bucket's own region by region=NAME, or its endpoint",
}


@dataclass(frozen=True, slots=True)
class S3Place:
    """What a URL says. `retain` in seconds, 0: no object lock."""

    url: str
    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    credentials: Path | None = None
    style: str = "auto"
    ca: Path | None = None
    retain: float = 0.0
    retain_mode: str = "COMPLIANCE"

    @classmethod
    def parse(cls, url: str) -> S3Place:
        """Raises ConfigError, which never repeats the URL: it may hold a secret that has no business there."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ConfigError(reason=f"unknown option {unknown[0]!r} of an s3 URL", hint=", ".join(_OPTIONS))
        endpoint = options.get("endpoint")
        if "@" in parts.netloc or "@" in (endpoint or ""):
            raise ConfigError(
                reason="credentials have no place in an s3 URL", hint="use profile=NAME or credentials=FILE"
            )
        prefix = parts.path.strip("/")
        if _BUCKET.fullmatch(parts.netloc) is None or (prefix and _PREFIX.fullmatch(prefix) is None):
            raise ConfigError(reason="not an s3 URL", hint="s3://BUCKET/PREFIX?endpoint=URL&region=NAME")
        return cls(
            url=url,
            bucket=parts.netloc,
            prefix=prefix + "/" if prefix else "",
            endpoint=endpoint,
            region=options.get("region"),
            profile=options.get("profile"),
            credentials=Path(options["credentials"]) if "credentials" in options else None,
            style=_one_of(options, "style", "path" if endpoint else "auto", ("auto", "path", "virtual")),
            ca=Path(options["ca"]) if "ca" in options else None,
            retain=_seconds(options.get("retain", "0")),
            retain_mode=_one_of(options, "retain-mode", "compliance", ("compliance", "governance")).upper(),
        )


class S3Backend:
    """Objects below `place.prefix` of a bucket that exists. Asks nothing before the first call.

    Thread-safe: one boto3 client for all threads; `_lock` guards its making and the proof of exclusive creation.
    """

    def __init__(self, place: S3Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._made: Any = None
        self._exclusive: bool | None = None

    @classmethod
    def from_url(cls, url: str) -> S3Backend:
        return cls(S3Place.parse(url))

    @property
    def url(self) -> str:
        return self._place.url

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            self.stat(name)
            return b""
        request = self._at(name)
        if offset or length is not None:
            request["Range"] = f"bytes={offset}-" if length is None else f"bytes={offset}-{offset + length - 1}"
        with self._named(name):
            try:
                answer = self._client().get_object(**request)
                data: bytes = answer["Body"].read()
            except Exception as error:
                if _code(error) in {"InvalidRange", "416"}:
                    return b""  # the offset is at the end or beyond
                raise
            self._whole(answer, "ContentLength", name)
        if "Range" in request and "ContentRange" not in answer:
            # Some gateways ignore the wish and send everything.
            return data[offset : None if length is None else offset + length]
        return data

    def put(self, name: str, data: Buffer) -> None:
        request = {**self._at(name), **self._retention(name)}
        if not self._is_exclusive(name) and self._is_there(name):
            raise AlreadyExists(url=self.url, name=name)
        self._put(name, request, data)

    def delete(self, name: str) -> None:
        with self._named(name):
            self._client().delete_object(**self._at(name))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self._place.prefix
        request = {"Bucket": self._place.bucket, "Prefix": start + check_prefix(prefix)}
        while True:
            with self._named(prefix):
                page = self._client().list_objects_v2(**request)
                self._whole(page, "IsTruncated", prefix)
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(start)
                if is_name(name) and not name.startswith("probe-"):
                    yield ObjectInfo(name, entry["Size"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, name: str) -> ObjectInfo:
        with self._named(name):
            answer = self._client().head_object(**self._at(name))
            self._whole(answer, "ContentLength", name)
        return ObjectInfo(name, answer["ContentLength"], answer["LastModified"].timestamp())

    def capabilities(self) -> Capabilities:
        """`create_only` is known after the first put, and True until then."""
        return Capabilities(create_only=self._exclusive is not False, remote=True, retention=self._place.retain)

    def close(self) -> None:
        with self._lock:
            if self._made is not None:
                self._made.close()

    def _at(self, name: str) -> dict[str, Any]:
        return {"Bucket": self._place.bucket, "Key": self._place.prefix + check_name(name)}

    def _put(self, name: str, request: dict[str, Any], data: Buffer) -> None:
        content = data if isinstance(data, bytes) else bytes(data)
        with self._named(name):
            body = io.BytesIO(content)
            answer = self._client().put_object(**request, Body=body, ContentLength=len(content), IfNoneMatch="*")
            self._whole(answer, "ETag", name)

    def _whole(self, answer: dict[str, Any], field: str, name: str) -> None:
        """An answer that broke off behind its first line passes for a success: an empty object, an empty listing."""
        if field not in answer:
            raise Temporary(url=self.url, name=name, reason=f"the answer has no {field}")

    def _is_there(self, name: str) -> bool:
        try:
            self.stat(name)
        except ObjectNotFound:
            return False
        return True

    def _is_exclusive(self, name: str) -> bool:
        """Whether the store refuses to create an object twice, tried out once. Errors speak of `name`."""
        with self._lock:
            known = self._exclusive
        if known is None:
            request = self._at(f"probe-{secrets.token_hex(8)}")
            known = False
            self._put(name, request, b"1")
            try:
                self._put(name, request, b"2")
            except AlreadyExists:
                known = True
            with self._named(name):
                self._client().delete_object(**request)
            with self._lock:
                self._exclusive = known
        return known

    def _retention(self, name: str) -> dict[str, Any]:
        if not self._place.retain or name.startswith(_NOT_RETAINED):
            return {}
        until = datetime.now(UTC) + timedelta(seconds=self._place.retain)
        # The protocol wants a digest of the content with every lock.
        return {
            "ObjectLockMode": self._place.retain_mode,
            "ObjectLockRetainUntilDate": until,
            "ChecksumAlgorithm": "SHA256",
        }

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = _connect(self._place)
            return self._made

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """botocore's errors become ours, which name the object."""
        try:
            yield
        except (RewindError, TypeError, AttributeError, LookupError, MemoryError):
            raise  # ours already, or a mistake in this program, which no other try mends
        except Exception as error:
            raise _translated(error, self.url, name) from error


def _connect(place: S3Place) -> Any:
    import boto3
    import botocore.session
    from botocore.config import Config

    core = botocore.session.get_session()
    if place.credentials:
        core.set_config_variable("credentials_file", str(place.credentials))
    session = boto3.session.Session(botocore_session=core, profile_name=place.profile, region_name=place.region)
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"addressing_style": place.style},
        # The newer default, a checksum in a trailer, is refused by many stores. Nothing is lost: the whole request,
        # content included, is signed by its SHA-256, and everything stored is sealed or carries its own digest.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client(
        "s3",
        endpoint_url=place.endpoint,
        region_name=session.region_name or "us-east-1",
        verify=str(place.ca) if place.ca else None,
        config=config,
    )


def _translated(error: Exception, url: str, name: str) -> StoreError | ConfigError:
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return _refused(error, url, name)
    reason = str(error)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: s3://…?profile=NAME"
        return PermissionDenied(url=url, name=name, reason=reason, hint=hint)
    mistakes = boto.ProfileNotFound | boto.ConfigParseError | boto.ConfigNotFound | boto.ParamValidationError
    if isinstance(error, mistakes | ValueError):
        return ConfigError(reason=f"{url}: {reason}")
    if isinstance(error, boto.SSLError):
        hint = "ca=FILE in the URL names the certificates to trust"
        return StoreError(reason=f"{url} is not trusted: {reason}", hint=hint)
    # Connections that are refused, time out or break off in the middle of an answer; also whatever we do not know:
    # an error must not be taken for the absence of an object.
    return Temporary(url=url, name=name, reason=reason)


def _refused(error: Any, url: str, name: str) -> StoreError:
    """What the store itself said."""
    code = _code(error)
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    reason = f"{code}: {error.response.get('Error', {}).get('Message') or status}"
    hint = _HINTS.get(code, "")
    for kind, codes in _KINDS:
        if code in codes or status in codes:
            return kind(url=url, name=name, reason=reason, hint=hint)
    if status.startswith("5"):
        return Temporary(url=url, name=name, reason=reason)
    return StoreError(reason=f"{url} refused {name!r}: {reason}", hint=hint)


def _code(error: Exception) -> str:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _one_of(options: dict[str, str], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = options.get(name, default)
    if value not in allowed:
        raise ConfigError(reason=f"option {name} of an s3 URL is {value!r}", hint=f"one of {', '.join(allowed)}")
    return value


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(reason=f"option retain of an s3 URL: {error}", hint="retain=30d") from error
