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
from pipelines.core.errors import ConfigError, IngotError, IntegrityError, LockedError, TransientError

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
        ConfigError: the project is no git repository, or cannot be written to.
        IntegrityError: objects are missing or damaged in the remote.
        TransientError: any other failure: network, credentials, disk.
    """
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
                raise _error(arguments, done.stderr)
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


def _error(arguments: tuple[str, ...], stderr: str) -> IngotError:
    said = "\n".join(line for line in stderr.splitlines() if line.startswith("ERROR:")) or stderr.strip()[-2000:]
    command = f"dvc {' '.join(arguments)}"
    if "unsaved files" in stderr:
        return IntegrityError(
            f"{command}: files in the work tree were edited and would be lost\n{said}",
            hint=f"`dvc pull --force {arguments[-1]}` discards them; `ingot data add` records them as a new version",
        )
    if any(sign in stderr for sign in ("missing-files", "Missing cache files", "failed to push data to the cloud")):
        return IntegrityError(
            f"{command}: the remote (or the cache) lacks an object that data.dvc names, or has a damaged one\n{said}",
            hint=RESTORE,
        )
    if "is not a git repository" in stderr:
        return ConfigError(
            f"{command}: the project is no git repository, and DVC wants one",
            hint="`git init`, or `dvc config core.no_scm true` does without",
        )
    return TransientError(f"{command} failed\n{said}", hint=CHECK_REMOTE)
