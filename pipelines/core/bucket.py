"""Objects below one prefix of an S3 bucket: the only module that knows boto3, which it imports when it is first asked.

Where the server is and who asks is boto3's to find: `AWS_*` variables, profiles, endpoint URLs, addressing styles and
proxy rules work as everywhere, and no credential passes through here. Faults that may pass are tried again for
`PATIENCE_S`; wrong credentials and a missing bucket are named at once.
"""

from __future__ import annotations

import email.utils
import functools
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines.core import disk
from pipelines.core.errors import ConfigError, IngotError, TransientError

T = TypeVar("T")

SCHEME = "s3://"
PATIENCE_S = 60.0
"""How long a server that is away, or too busy, is asked again."""
_ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>[^?#\s]*))?")
_PAUSES_S = (0.2, 3.0)
"""The first pause between two attempts, and the longest."""
_AT_ONCE = 10
_PARTS_AT_ONCE = 4
"""Of each file."""
_WHOLE_BYTES = 64 * 2**20
"""A larger file is carried over in parts."""
_PART_BYTES = 16 * 2**20
_CHUNK_BYTES = 4 * 2**20
_DELETED_AT_ONCE = 1000
"""What one request may name."""

_CREDENTIALS = {
    "AccessDenied",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "PermanentRedirect",
    "SignatureDoesNotMatch",
    "403",
    "301",
}
_MISSING = {"NoSuchKey", "NoSuchUpload", "NotFound", "404"}
_BUSY = {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException", "TooManyRequests"}
_CREDENTIALS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_REGION and AWS_ENDPOINT_URL say which server"
)


class ConflictError(IngotError):
    """An object is not, or no longer, what a conditional write expected."""


@dataclass(frozen=True)
class Entry:
    """One object in a listing."""

    name: str
    """Below the prefix."""
    size: int
    etag: str
    modified: float
    """Seconds since 1970, by the clock of the server."""


@dataclass(frozen=True)
class Content:
    """A small object, read whole."""

    text: str
    etag: str
    modified: float
    """Seconds since 1970, by the clock of the server."""
    age_s: float
    """How long ago it was written, by the clock of the server alone."""


class Bucket:
    """Objects below a prefix.

    Args:
        address: `s3://BUCKET/PREFIX`.

    Raises:
        ConfigError: it is no such address.
    """

    def __init__(self, address: str) -> None:
        parts = _ADDRESS.fullmatch(address.rstrip("/"))
        if parts is None or ".." in (parts["prefix"] or "").split("/"):
            raise ConfigError(f"store.path = {address!r} is no address of a bucket", hint="s3://BUCKET/PREFIX")
        self.bucket = parts["bucket"]
        self._prefix = f"{parts['prefix']}/" if parts["prefix"] else ""
        self.address = f"{SCHEME}{self.bucket}/{self._prefix}".rstrip("/")

    def place(self, name: str) -> str:
        """Return the whole address of an object."""
        return f"{self.address}/{name}"

    @functools.cached_property
    def endpoint(self) -> str:
        """Where the server is."""
        return str(self._client.meta.endpoint_url)

    # ---- small objects -----------------------------------------------------------------------------------------------

    def read(self, name: str) -> Content | None:
        """Return a small object, or None where there is none."""

        def get() -> Content:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._prefix + name)
            now = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
            modified = answer["LastModified"].timestamp()
            text = answer["Body"].read().decode("utf-8", errors="replace")
            return Content(text, answer["ETag"], modified, max(0.0, now - modified))

        return self._asked(get, f"reading {name}")

    def write(self, name: str, text: str, *, expected: str | None = None, absent: bool = False) -> str:
        """Write a small object and return its tag.

        Args:
            name: below the prefix.
            text: no two writers of a conditional write may have the same, or both take it for their own.
            expected: tag that the object must have.
            absent: whether there must be no such object.

        Raises:
            ConflictError: it is not what was expected.
        """
        condition = {"IfNoneMatch": "*"} if absent else {} if expected is None else {"IfMatch": expected}
        put = functools.partial(
            self._client.put_object, Bucket=self.bucket, Key=self._prefix + name, Body=text.encode(), **condition
        )
        try:
            answer: Mapping[str, Any] | None = self._asked(put, f"writing {name}")
        except ConflictError:
            # An attempt whose answer was lost has written it.
            if (there := self.read(name)) is not None and there.text == text:
                return there.etag
            raise
        if answer is None:
            raise ConflictError(f"{self.place(name)} is gone")
        return str(answer["ETag"])

    def delete(self, *names: str) -> None:
        """Remove objects; those that are not there count as removed."""
        for start in range(0, len(names), _DELETED_AT_ONCE):
            keys = [{"Key": self._prefix + name} for name in names[start : start + _DELETED_AT_ONCE]]
            ask = functools.partial(
                self._client.delete_objects, Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True}
            )
            answer = self._asked(ask, f"removing {len(keys)} objects") or {}
            if failed := answer.get("Errors"):
                raise IngotError(f"{self.place(failed[0]['Key'])} could not be removed: {failed[0].get('Message')}")

    def entries(self, prefix: str) -> list[Entry]:
        """Return every object whose name begins so."""

        def ask() -> list[Entry]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix
            )
            return [
                Entry(each["Key"][len(self._prefix) :], each["Size"], each["ETag"], each["LastModified"].timestamp())
                for page in pages
                for each in page.get("Contents", [])
            ]

        return self._asked(ask, f"listing {prefix}") or []

    def folders(self, prefix: str) -> list[str]:
        """Return the names one level below a prefix that ends in `/`."""

        def ask() -> list[str]:
            whole = self._prefix + prefix
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=whole, Delimiter="/"
            )
            found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])]
            return [name[len(whole) :].rstrip("/") for name in found]

        return self._asked(ask, f"listing {prefix}") or []

    # ---- files -------------------------------------------------------------------------------------------------------

    def upload(self, files: Mapping[str, Path]) -> None:
        """Upload files by the names of their objects, several at once; one that fails leaves no parts behind."""

        def put(name: str) -> None:
            with files[name].open("rb") as stream:
                if files[name].stat().st_size <= _WHOLE_BYTES:
                    self._client.put_object(Bucket=self.bucket, Key=self._prefix + name, Body=stream)
                else:
                    self._client.upload_fileobj(stream, self.bucket, self._prefix + name, Config=_in_parts())

        self._transfer(list(files), put)

    def download(self, files: Mapping[str, Path]) -> None:
        """Download objects into files, several at once.

        Raises:
            FileNotFoundError: one of them is not there.
        """

        def get(name: str) -> None:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._prefix + name)
            with files[name].open("wb", buffering=0) as stream:
                if answer["ContentLength"] <= _WHOLE_BYTES:
                    shutil.copyfileobj(answer["Body"], stream, _CHUNK_BYTES)
                    return
                answer["Body"].close()
                self._client.download_fileobj(self.bucket, self._prefix + name, stream, Config=_in_parts())

        self._transfer(list(files), get)

    def _transfer(self, names: list[str], carry: Callable[[str], None]) -> None:
        """Carry files over; what met a fault that may pass is begun again, for as long as some come through."""
        left, last_progress, pauses = names, time.monotonic(), _pauses()
        while left:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                faults = dict(zip(left, pool.map(lambda name: _fault_of(carry, name), left), strict=True))
            left = [name for name, fault in faults.items() if fault is not None]
            if len(left) < len(faults):
                last_progress, pauses = time.monotonic(), _pauses()
            for name in left:
                error = self._told(faults[name], f"transferring {name}")
                if error is None:
                    raise FileNotFoundError(self.place(name))
                if not isinstance(error, TransientError) or time.monotonic() - last_progress > PATIENCE_S:
                    raise error from None
            if left:
                time.sleep(next(pauses))

    def unfinished_uploads(self, prefix: str, *, older_than_s: float = 0.0) -> list[str]:
        """Return the names of the uploads below a prefix that were not completed, and began so long ago."""
        latest = time.time() - older_than_s
        begun = self._uploads(prefix)
        return [each["Key"][len(self._prefix) :] for each in begun if each["Initiated"].timestamp() <= latest]

    def abort_uploads(self, prefix: str) -> None:
        """Remove the parts of uploads below a prefix that were never completed."""
        for each in self._uploads(prefix):
            abort = functools.partial(
                self._client.abort_multipart_upload, Bucket=self.bucket, Key=each["Key"], UploadId=each["UploadId"]
            )
            self._asked(abort, "removing an unfinished upload")

    def _uploads(self, prefix: str) -> list[dict[str, Any]]:
        def ask() -> list[dict[str, Any]]:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix
            )
            return [each for page in pages for each in page.get("Uploads", [])]

        return self._asked(ask, "listing unfinished uploads") or []

    # ---- asking ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        try:
            return boto3.session.Session().client(
                "s3", config=Config(connect_timeout=5, read_timeout=30, max_pool_connections=4 * _AT_ONCE)
            )
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"the store {self.address} cannot be reached: {error}", hint=_CREDENTIALS_HINT) from None

    def _asked(self, ask: Callable[[], T], what: str) -> T | None:
        """Return an answer, or None where there is no such object.

        Raises:
            ConflictError: a condition was not met.
            ConfigError: the bucket is missing, or the credentials are wrong.
            TransientError: the server stayed away for `PATIENCE_S`.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        deadline, pauses = time.monotonic() + PATIENCE_S, _pauses()
        while True:
            try:
                return ask()
            except (BotoCoreError, ClientError, OSError) as fault:
                error = self._told(fault, what)
                if error is None:
                    return None
                if not isinstance(error, TransientError) or time.monotonic() > deadline:
                    raise error from None
            time.sleep(next(pauses))

    def _told(self, fault: BaseException | None, what: str) -> IngotError | None:
        """Return a fault as an error that says what to do; None where there is no such object."""
        from botocore import exceptions
        from urllib3.exceptions import HTTPError

        if not isinstance(fault, exceptions.ClientError):
            if isinstance(fault, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
                return ConfigError(f"there are no credentials for the store {self.address}", hint=_CREDENTIALS_HINT)
            if isinstance(fault, OSError) and (fault.filename is not None or disk.is_full(fault)):
                raise fault  # of a file here
            if fault is not None and not isinstance(fault, exceptions.BotoCoreError | OSError | HTTPError):
                raise fault
            return TransientError(
                f"the store {self.address} at {self.endpoint} does not answer: {what} failed for {PATIENCE_S:.0f} s "
                f"({type(fault).__name__})",
                hint="when it is back, the same command goes on where it stopped",
            )
        code, message = fault.response["Error"].get("Code", ""), fault.response["Error"].get("Message", "")
        status = fault.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        if status in {409, 412}:
            return ConflictError(f"{self.address}: {what}: {code}")
        if code == "NoSuchBucket":
            return ConfigError(
                f"store.path: there is no bucket {self.bucket} at {self.endpoint}",
                hint="make it, or correct store.path, INGOT_STORE or AWS_ENDPOINT_URL",
            )
        if code in _CREDENTIALS or status in {301, 401, 403}:
            return ConfigError(
                f"the store {self.address} at {self.endpoint} refuses these credentials: {what}: {code} {message}",
                hint=_CREDENTIALS_HINT,
            )
        if code in _MISSING:
            return None
        if status >= 500 or status == 429 or code in _BUSY:
            return TransientError(
                f"the store {self.address} at {self.endpoint} was too busy for {PATIENCE_S:.0f} s: {what}: {code}",
                hint="the same command goes on where it stopped",
            )
        return IngotError(f"{self.address}: {what}: {code} {message}")


def _fault_of(carry: Callable[[str], None], name: str) -> BaseException | None:
    try:
        carry(name)
    except Exception as error:  # noqa: BLE001 - it is told by its kind
        return getattr(error, "last_exception", error)  # of a download in parts that was given up
    return None


def _in_parts() -> Any:
    """Return how a large file is carried over."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        max_concurrency=_PARTS_AT_ONCE, multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES
    )


def _pauses() -> Iterator[float]:
    """Yield pauses that double, each a random part of its length: many who wait do not come back together."""
    pause, longest = _PAUSES_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, longest)
