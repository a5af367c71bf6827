"""Leases on S3: at most one process on all machines works on an artifact, and a dead holder blocks nobody for long.

A lease is an object that is only ever replaced by whoever knows its tag (a conditional write), so two never get it.
Its holder writes it anew every `BEAT_S`. One that was not written for `LEASE_S`, by the clock of the server alone, may
be taken over: its token is raised, and what the former holder then tries to write or to publish is refused, however
long it slept. A holder that dies on the same machine is recognised at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Collection, Iterator

from pydantic import BaseModel

from pipelines.core import processes
from pipelines.core.bucket import Bucket, ConflictError, Content
from pipelines.core.errors import IngotError, LockedError, LockLost
from pipelines.core.processes import ProcessName

log = logging.getLogger(__name__)

ENDING = ".lease"
LEASE_S = float(os.environ.get("INGOT_LEASE_S", "60"))
"""How long a holder may show no sign of life."""
BEAT_S = LEASE_S / 6
_POLL_S = 0.5


class Held(BaseModel):
    """What a lease object says."""

    owner: ProcessName | None = None
    """None: it was given back."""
    machine: str = ""
    token: int = 0
    """Raised whenever it changes hands."""
    nonce: str = ""
    """No two writes are alike, so no tag comes again."""
    inputs: list[str] = []
    """Fingerprints of the artifacts that its holder reads."""
    publishing: str | None = None
    """Object that its holder is about to write."""

    @classmethod
    def of(cls, content: Content) -> Held:
        """Return what an object says; a damaged one counts as given back."""
        try:
            return cls.model_validate_json(content.text)
        except ValueError:
            return cls()

    def is_free(self, age_s: float) -> bool:
        """Return whether it may be taken, when it was last written so many seconds ago."""
        if self.owner is None or age_s > LEASE_S:
            return True
        return self.machine == processes.machine() and not self.owner.alive()


class ObjectLease:
    """One lease, from `acquire` to `release`.

    Args:
        bucket: where it lies.
        name: its name, without an ending.
        what: what is locked, for messages.
        inputs: fingerprints of the artifacts that are read meanwhile.
    """

    def __init__(self, bucket: Bucket, name: str, what: str, inputs: Collection[str] = ()) -> None:
        self._bucket, self._object, self._what = bucket, name + ENDING, what
        self._held = Held(owner=processes.this_process(), machine=processes.machine(), inputs=sorted(inputs))
        self._tag = ""
        self._writing, self._stopping = threading.Lock(), threading.Event()
        self._lost = False
        self._beats: threading.Thread | None = None

    @property
    def token(self) -> int:
        """Which holder of this lease this is, counted from 1."""
        return self._held.token

    def acquire(self, wait_s: float | None) -> None:
        """Take it, waiting for another holder for so long; None waits for ever.

        Raises:
            LockedError: another process still held it; the message names that process.
        """
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while (other := self._try()) is not None:
            if deadline is not None and time.monotonic() >= deadline:
                raise LockedError(
                    f"{self._what} is locked by {other}", hint="wait for that run, or stop it, then run again"
                )
            time.sleep(_POLL_S)
        self._beats = threading.Thread(target=self._beat, name=f"lease {self._object}", daemon=True)
        self._beats.start()

    def _try(self) -> ProcessName | None:
        """Take it if it is free; else return its holder."""
        there = self._bucket.read(self._object)
        before = Held() if there is None else Held.of(there)
        if there is not None and not before.is_free(there.age_s):
            return before.owner
        self._held = self._held.model_copy(update={"token": before.token + 1})
        try:
            self._write(None if there is None else there.etag)
        except ConflictError:
            return self._try()  # somebody was faster
        if before.owner is not None and before.publishing is not None:
            self._fence(before.publishing)
        return None

    def _fence(self, name: str) -> None:
        """Change the tag of an object, so that a former holder that was suspended in writing it can no longer do so."""
        there = self._bucket.read(name)
        with contextlib.suppress(ConflictError):
            if there is None:
                self._bucket.write(name, "\n", absent=True)
            else:
                self._bucket.write(name, there.text + "\n", expected=there.etag)

    def _write(self, expected: str | None) -> None:
        self._held = self._held.model_copy(update={"nonce": uuid.uuid4().hex})
        text = self._held.model_dump_json()
        self._tag = self._bucket.write(self._object, text, expected=expected, absent=expected is None)

    def check(self, publishing: str | None = None) -> None:
        """Make sure that it is still held, by writing it anew.

        Args:
            publishing: the object that is about to be written: whoever takes over shuts this process out of it.

        Raises:
            LockLost: it was taken over.
        """
        with self._writing:
            if not self._lost:
                self._held = self._held.model_copy(update={"publishing": publishing})
                try:
                    self._write(self._tag)
                except ConflictError:
                    self._lost = True
        if self._lost:
            raise LockLost(
                f"{self._what} was taken over by another process: this one showed no sign of life for {LEASE_S:.0f} s",
                hint="nothing was published by this one; the other goes on",
            )

    def _beat(self) -> None:
        while not self._stopping.wait(BEAT_S):
            try:
                self.check(self._held.publishing)
            except LockLost as error:
                log.warning("%s", error.message)
                return
            except IngotError as error:
                log.warning("%s", error.message)  # whoever does not take over meanwhile lets this one go on

    def release(self) -> None:
        """Give it back."""
        self._stopping.set()
        with self._writing:
            if self._lost:
                return
            self._held = Held(token=self._held.token)
            try:
                self._write(self._tag)
            except IngotError as error:
                log.info("%s was not given back: %s", self._what, error.message)


@contextlib.contextmanager
def hold(
    bucket: Bucket, name: str, *, what: str, wait_s: float | None, inputs: Collection[str] = ()
) -> Iterator[ObjectLease]:
    """Hold a lease for the length of the block; see `ObjectLease`."""
    lease = ObjectLease(bucket, name, what, inputs)
    lease.acquire(wait_s)
    try:
        yield lease
    finally:
        lease.release()


def is_free(bucket: Bucket, name: str) -> bool:
    """Return whether nobody holds a lease."""
    there = bucket.read(name + ENDING)
    return there is None or Held.of(there).is_free(there.age_s)
