"""DVC as a child process: one command at a time per project, with a deadline and errors that say what to do.

DVC guards its state with a lock file and gives up within seconds when another command holds it. Commands of this
application therefore queue on a lease of their own, and one that meets a foreign DVC tries again until its deadline.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from pipelines.core import lock, program
from pipelines.core.errors import (
    ConfigError,
    DiskFullError,
    IngotError,
    IntegrityError,
    LockedError,
    TransientError,
)
from pipelines.data import importing, remote

DEADLINE_S = 3600.0
"""Longest time that one command may take, waiting for the lock included: pulls of large corpora are slow."""
LOCK_WAIT_S = 120.0
"""Longest wait for another DVC command."""
RESTORE = "`ingot data push` from a project that has this version of the corpus restores the remote"
CHECK_REMOTE = "check the remote: `dvc remote list`, its address and credentials"
_RETRY_S = 0.5


def run(project: Path, *arguments: str, lock_wait_s: float = LOCK_WAIT_S) -> str:
    """Run one DVC command in the project and return what it printed.

    Args:
        project: the folder with `.dvc`.
        arguments: the command, for instance `"pull", "data.dvc"`.
        lock_wait_s: how long to wait for another DVC command.

    Raises:
        LockedError: another DVC command held the lock for longer than `lock_wait_s`.
        ConfigError: no git repository, no remote, no bucket, no access, a merge conflict, a source that is gone; or the
            project cannot be written to.
        IntegrityError: edited files are in the way, or objects are missing or damaged in the remote.
        TransientError: the remote does not answer, the disk is full, or any other failure.
    """
    if not (project / ".dvc").is_dir():
        raise ConfigError(
            f"{project} has no folder .dvc",
            hint="`dvc init` makes it (`--no-scm` without git); `git checkout .dvc` brings back one that was lost",
        )
    give_up = time.monotonic() + lock_wait_s
    with contextlib.ExitStack() as held:
        place = project / ".dvc" / "tmp" / "ingot.lock"
        try:
            held.enter_context(lock.hold(place, what="DVC in this project", wait_s=lock_wait_s))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigError(
                f"DVC keeps locks in {place.parent}, which cannot be written to: {reason}",
                hint="run this as the owner of the project, or in a copy: `git clone` it and `ingot data pull` there",
            ) from error
        while True:
            done = _start(project, arguments)
            if done.returncode == 0:
                return done.stdout
            if "Unable to acquire lock" not in done.stderr:
                raise _error(project, arguments, done.stderr)
            if time.monotonic() > give_up:
                raise LockedError(
                    f"another DVC command has held the lock of {project} for {lock_wait_s:.0f} s",
                    hint="wait for it, or stop it; then run the same command again",
                )
            time.sleep(_RETRY_S)


def _start(project: Path, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            program.command("dvc", *arguments),
            cwd=project,
            env={**os.environ, "DVC_NO_ANALYTICS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        raise TransientError(f"dvc {' '.join(arguments)} took longer than {DEADLINE_S:.0f} s") from None


def _error(project: Path, arguments: tuple[str, ...], stderr: str) -> IngotError:
    """Return what a failure of DVC was: it has one exit code for all of them, so that its words must tell."""
    # DVC says a merge conflict without the word ERROR.
    said = "\n".join(line for line in stderr.splitlines() if line.startswith("ERROR:")) or stderr.strip()[-2000:]
    command = f"dvc {' '.join(arguments)}"
    for signs, kind, what, hint in _KNOWN:
        if any(sign in stderr for sign in signs):
            return kind(f"{command}: {what}\n{said}", hint=hint.format(last=arguments[-1]))
    if not any(sign in stderr for sign in _MISSING):
        return TransientError(f"{command} failed\n{said}", hint=CHECK_REMOTE)
    # To DVC an object is missing also where its bucket is, or where nobody may look.
    try:
        with remote.reached(project):
            pass
    except IngotError as error:
        return type(error)(f"{command}: {error.message}", hint=error.hint)
    return IntegrityError(
        f"{command}: the remote (or the cache) lacks an object that data.dvc names, or has a damaged one\n{said}",
        hint=RESTORE,
    )


_Signs = tuple[str, ...]
_KNOWN: tuple[tuple[_Signs, type[IngotError], str, str], ...] = (
    (
        ("unsaved files",),
        IntegrityError,
        "files in the work tree were edited and would be lost",
        "`ingot data pull --force` discards them; `ingot data add` records them as a new version",
    ),
    (
        ("is not a git repository",),
        ConfigError,
        "the project is no git repository, and DVC wants one",
        "`git init`, or `dvc config core.no_scm true` does without",
    ),
    (
        ("possible merge conflicts",),
        ConfigError,
        "a DVC file is no valid YAML, most likely of an unresolved merge conflict",
        "`git diff` shows it; `git checkout --ours` or `--theirs` of the file chooses one side",
    ),
    (("no remote specified",), ConfigError, "the project has no DVC remote", remote.NO_REMOTE),
    (
        ("config file error",),
        ConfigError,
        "DVC's configuration is wrong",
        "`dvc config --list --show-origin` says which file",
    ),
    (
        ("dependency '", "missing data source"),
        ConfigError,
        "what the corpus was imported from is gone",
        "put it back; or `ingot data add` records the corpus as it is here",
    ),
    (
        ("NoSuchBucket", "bucket does not exist"),
        ConfigError,
        "the remote's bucket does not exist",
        "`dvc remote list` shows the address; `dvc remote modify NAME url URL` corrects it",
    ),
    (
        ("Forbidden", "Unable to locate credentials", "Access Denied", "AccessDenied", "InvalidAccessKeyId", "(403)",
         "SignatureDoesNotMatch", "config profile", "Permission denied", "PermissionError"),
        ConfigError,
        "no access to the remote",
        importing.CREDENTIALS,
    ),
    (
        ("No space left on device",),
        DiskFullError,
        "no space left on the disk",
        "free some, `ingot data gc` and `ingot gc` do; then run the same command again",
    ),
    (
        ("failed to connect", "Could not connect", "Cannot connect", "onnection refused", "onnection reset", "imed out",
         "imeout", "SlowDown", "Service Unavailable", "Bad Gateway", "InternalError"),
        TransientError,
        "the remote does not answer",
        "run the same command again when it does; `dvc remote list` shows its address",
    ),
)  # fmt: skip
"""What DVC says, in order -> class, what it was, what to do."""
_MISSING = ("missing-files", "Missing cache files", "NoSuchKey", "No such file", "failed to push data to the cloud")
