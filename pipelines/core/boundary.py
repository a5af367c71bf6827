"""The one boundary where errors of Python and of libraries become ours: what happened, to which file, what to do.

Whatever a user, another process or a machine can do to a command ends here in one of `pipelines.core.errors`. What is
left over is a fault of Ingot, and the caller says how to report it. Errors are told by the names of their classes, so
that nothing is imported that the command did without.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.core import disk
from pipelines.core.errors import ConfigError, DiskFullError, IngotError, IntegrityError, TransientError

_AGAIN = "run the same command again"
_DAMAGED = "`ingot verify` names damaged artifacts; of a file of your own, bring a whole copy"
_MEMORY = ("cannot allocate memory", "out of memory", "can't allocate memory", "bad_alloc")


def known(error: BaseException) -> IngotError | None:
    """Return an error as one of ours, with the file and the next step; None for one that nobody foresaw."""
    if isinstance(error, IngotError):
        return error
    if disk.is_full(error):
        where = getattr(error, "filename", None) or "of the store or of a temporary file"
        return DiskFullError(f"no space left on the disk ({where}): {error}", hint=disk.HINT)
    for each in _chain(error):
        if isinstance(each, IngotError):
            return each
        for convert in _CONVERTERS:
            if (converted := convert(each)) is not None:
                return converted
    return None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise a foreseen error of a library inside the block as one of ours: a task is tried again by its class."""
    try:
        yield
    except Exception as error:
        converted = known(error)
        if converted is None or converted is error:
            raise
        raise converted from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it: libraries wrap what the system said."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _of_the_system(error: BaseException) -> IngotError | None:
    """Convert what the operating system refused, by its number."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where, why = _path(error), error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{where}: {why.lower()} ({_owner(where)})", hint=_permission_hint(error.errno))
    if error.errno == errno.ENOENT and _is_program(error):
        return ConfigError(f"the program {where} is not installed, or not in PATH", hint=f"install {where}")
    if error.errno in _OF_A_PATH:
        return ConfigError(f"{where}: {why.lower()}", hint="check that path, and the folders above it")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TransientError(f"too many files are open ({where})", hint=f"`ulimit -n 4096`, then {_AGAIN}")
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return TransientError(f"the system has no more memory or processes ({why})", hint=f"free some, then {_AGAIN}")
    if error.errno in _OF_A_DEVICE:
        return TransientError(f"{where}: {why.lower()}", hint=f"look after that disk or mount, then {_AGAIN}")
    if error.errno in _OF_A_NETWORK:
        return TransientError(f"a connection failed: {error}", hint=f"check that the server runs, then {_AGAIN}")
    return None


_OF_A_PATH = (
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EINVAL,
    errno.EXDEV,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTSUP,
    errno.ETXTBSY,
    errno.EFBIG,
)
_OF_A_DEVICE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EBUSY, errno.ENOLCK)
_OF_A_NETWORK = (
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EADDRINUSE,
    errno.EADDRNOTAVAIL,
)


def _path(error: OSError) -> str:
    name = error.filename2 or error.filename
    return "a file" if name is None else os.fsdecode(name) if isinstance(name, str | bytes) else str(name)


def _is_program(error: OSError) -> bool:
    """Tell whether the file that is not there was to be executed: only then a child of ours was being made."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == subprocess.__file__:
            return True
        trace = trace.tb_next
    return False


def _owner(where: str) -> str:
    """Say whose the file is, or the nearest folder above it, with what mode, and who asks."""
    place = next((each for each in (Path(where), *Path(where).parents) if os.path.lexists(each)), Path("/"))
    try:
        state = place.stat()
    except OSError:
        return f"this process is user {os.geteuid()}"
    return f"{place} belongs to user {state.st_uid}, mode {state.st_mode & 0o7777:o}; this process is {os.geteuid()}"


def _permission_hint(number: int) -> str:
    if number == errno.EROFS:
        return "INGOT_STORE=FOLDER, on a disk that can be written to, takes the place of the store"
    return (
        "INGOT_STORE=FOLDER names a store of your own; to share one, give it a common group: "
        "`chgrp -R GROUP STORE && chmod -R g+rwX STORE && find STORE -type d -exec chmod g+s {} +`, and umask 002"
    )


def _of_memory(error: BaseException) -> IngotError | None:
    """Convert what ended for want of memory: Python's own, torch's, and workers that the kernel killed."""
    if type(error).__name__ == "BrokenProcessPool":
        return TransientError("a worker process was killed, most likely for want of memory", hint=_MEMORY_HINT)
    said = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(each in said for each in _MEMORY)):
        first = (str(error).strip().splitlines() or [""])[0]
        return TransientError(f"there is not enough memory: {first}".rstrip(": "), hint=_MEMORY_HINT)
    if isinstance(error, RecursionError):
        return ConfigError("the input is nested too deep to be read", hint="look for a value in thousands of brackets")
    return None


_MEMORY_HINT = f"free some memory, or take a smaller batch (`ingot plan` tells what a stage takes); then {_AGAIN}"


def _of_bytes(error: BaseException) -> IngotError | None:
    """Convert what a reader says of bytes that are cut short or changed."""
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        where = getattr(error, "filename", None) or f"a file that begins with {error.doc[:40]!r}"
        return IntegrityError(f"{where} is no whole JSON: {reason}", hint=_DAMAGED)
    if isinstance(error, UnicodeDecodeError | EOFError) or type(error).__name__ in _UNREADABLE:
        return IntegrityError(f"a file cannot be read, it is damaged or of another kind: {reason}", hint=_DAMAGED)
    return None


_UNREADABLE = {
    "ArrowInvalid",
    "BadGzipFile",
    "BadZipFile",
    "ReadError",
    "SafetensorError",
    "TOMLDecodeError",
    "ZstdError",
}
"""Names of classes that readers of archives, weights and tables raise."""


def _of_a_database(error: BaseException) -> IngotError | None:
    """Convert what SQLite says, itself or through SQLAlchemy."""
    name, said = type(error).__name__, str(error).lower()
    if name not in {"OperationalError", "DatabaseError", "NotSupportedError"}:
        return None
    first = str(error).splitlines()[0][:200]
    if "locked" in said or "busy" in said:
        hint = f"end the process that holds it (`fuser -v STORE/mlflow.db` names it), then {_AGAIN}"
        return TransientError(f"a database is locked by another process: {first}", hint=hint)
    if "readonly" in said or "unable to open" in said:
        hint = "check the permissions of the store and of mlflow.db in it; INGOT_STORE names another store"
        return ConfigError(f"a database cannot be written to: {first}", hint=hint)
    if "malformed" in said or "not a database" in said or "disk image" in said:
        hint = "move mlflow.db of the store away: `ingot sync` and `ingot promote` fill a new one from the store"
        return IntegrityError(f"a database is damaged: {first}", hint=hint)
    return TransientError(f"a database does not answer: {first}", hint=f"check that its server runs, then {_AGAIN}")


def _of_a_server(error: BaseException) -> IngotError | None:
    """Convert what clients of HTTP servers say."""
    if type(error).__module__.partition(".")[0] not in {"httpx", "httpcore", "requests", "urllib3", "http", "urllib"}:
        return None
    if isinstance(error, ValueError) or type(error).__name__ in {"InvalidURL", "UnsupportedProtocol"}:
        return ConfigError(f"not an address: {error}", hint="check PREFECT_API_URL, MLFLOW_TRACKING_URI and *_proxy")
    return TransientError(f"a server does not answer: {error}", hint=f"check that it runs, then {_AGAIN}")


_CONVERTERS: tuple[Callable[[BaseException], IngotError | None], ...] = (
    _of_memory,
    _of_bytes,
    _of_a_database,
    _of_a_server,
    _of_the_system,
)
