"""Whether a process that wrote its name somewhere still works: a process id alone is given again to strangers."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_START_FIELD = 22 - 3
"""`starttime` is field 22 of /proc/PID/stat (proc(5)); the third field is the first one after the name."""


class ProcessName(BaseModel):
    """One process, told apart from every later one with the same id."""

    model_config = ConfigDict(frozen=True)

    pid: int
    host: str
    start: str
    """When it started: boot id and clock ticks on Linux, seconds since 1970 elsewhere."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def alive(self) -> bool:
        """Return whether it still exists. One on another host cannot be asked, and is believed."""
        return self.host != socket.gethostname() or self.start == start_of(self.pid)


def this_process() -> ProcessName:
    """Return the name of the calling process."""
    pid = os.getpid()
    return ProcessName(pid=pid, host=socket.gethostname(), start=start_of(pid) or "")


@functools.cache
def machine() -> str:
    """Return a name for everything whose process ids mean the same as here; host names are shared by containers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{_boot_id()}:{namespace.stat().st_ino}" if namespace.exists() else socket.gethostname()


def start_of(pid: int) -> str | None:
    """Return when the process with this id started, in a form that no other process shares; None if there is none.

    A process that has ended and was not yet waited for (a zombie) counts as none.
    """
    if not Path("/proc/self/stat").exists():
        return _start_by_psutil(pid)
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else f"{_boot_id()}:{fields[_START_FIELD]}"


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start_by_psutil(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None
