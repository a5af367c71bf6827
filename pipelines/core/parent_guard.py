"""The smallest possible program around a rank: it makes sure that nothing outlives the launcher.

    python -I -S parent_guard.py exec PARENT COMMAND...   become COMMAND, and die when the process PARENT dies
    python -I -S parent_guard.py watch PARENT             kill the process groups named on stdin when PARENT dies

`exec` uses the kernel's parent-death signal, which reaches the rank itself at once. `watch` also reaches what the rank
started, and works where that signal does not exist. It runs by path, without site-packages, in about 20 ms; doing the
same between fork and exec would be unsafe, because the launcher may run in one of several threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
_READ_BYTES = 1 << 16


def command() -> list[str]:
    """Return what stands before a command that the kernel is to kill when the thread that starts it ends."""
    return [sys.executable, "-I", "-S", __file__, "exec", str(os.getpid())]


def become(parent: int, command: list[str]) -> NoReturn:
    """Replace this process by `command`, which the kernel then kills when the launcher's thread ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # The launcher died between the fork and prctl: no signal will ever come.
        sys.exit("the launcher is gone")
    # A crash report is faulthandler's stack dump in the log, not gigabytes of core file in the working folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # A rank has a connection to every other, and Linux gives 1,024 files where nobody asks for more.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.execvp(command[0], command)  # noqa: S606 - becoming the command is what this program is for


def watch(parent: int) -> None:
    """Read process group ids from stdin; when stdin closes or the launcher is gone, kill them.

    The launcher ends a watch in good order by killing the watcher.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    text = b""
    while os.getppid() == parent:
        if select.select([0], [], [], _POLL_S)[0]:
            chunk = os.read(0, _READ_BYTES)
            if not chunk:
                break
            text += chunk
    for group in text.split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "exec":
        become(int(sys.argv[2]), sys.argv[3:])
    watch(int(sys.argv[2]))
