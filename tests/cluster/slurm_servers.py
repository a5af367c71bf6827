"""A real Slurm on this host: munged, one slurmctld, and two slurmd that are called n1 and n2.

    .venv/bin/python -m tests.cluster.slurm_servers FOLDER

starts one, prints the value of SLURM_CONF, and stops it when its standard input closes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.core import parent_guard

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")
NODES = ("n1", "n2")
DEADLINE_S = 60.0

_CONF = """\
ClusterName=ingot
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=5
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no cluster here, or None."""
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(lacking)} not installed: `make cluster-test` installs slurm-wlm, as root on Debian"
    return None if os.geteuid() == 0 else "munged and slurmd of a private cluster need root"


@dataclass
class Slurm:
    """The servers of one cluster.

    Args:
        folder: where they keep everything; its path must be short enough for a socket.
    """

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        """The value of SLURM_CONF."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command that talks to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start all servers and wait until both nodes are idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONF.format(folder=self.folder, host=host, controller=ports[0], nodes="\n".join(nodes))
        self.conf.write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        paths = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._spawn("munged", "munged", "--foreground", "--force", f"--key-file={key}", *paths)
        wait_for((self.folder / "munge.sock").exists, "munged")
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.states() == dict.fromkeys(NODES, "idle"), "both nodes to be idle")

    def start_node(self, name: str) -> None:
        """Start one slurmd."""
        self._spawn(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its slurmd and everything that it started, at once."""
        server = self.processes.pop(name)
        slurmd = psutil.Process(server.pid)
        doomed = [slurmd, *slurmd.children(recursive=True), *self._steps(name)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # nobody may tell of another's end
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait(10)

    def _steps(self, name: str) -> list[psutil.Process]:
        """Return the step daemons of a node, which are nobody's children, and what runs in them."""
        found = []
        for process in psutil.process_iter(["name", "environ"]):
            environ = process.info["environ"] or {}
            if environ.get("SLURM_CONF") == str(self.conf) and environ.get("SLURMD_NODENAME") == name:
                found.append(process)
                with contextlib.suppress(psutil.NoSuchProcess):
                    parents = [each for each in process.parents() if each.name() == "slurmstepd"]
                    found += parents
        return found

    def states(self) -> dict[str, str]:
        """Return node -> state, as sinfo says it."""
        lines = self.ask("sinfo", "--Node", "--noheader", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def jobs(self) -> list[tuple[str, str, str]]:
        """Return (id, state, name) of every job that Slurm remembers, oldest first."""
        lines = self.ask("squeue", "--states=all", "--noheader", "--sort=i", "--format=%i|%T|%j").splitlines()
        return [(job, state, name) for job, state, name in (line.split("|") for line in lines)]

    def active(self) -> list[str]:
        """Return the ids of the jobs that have not ended."""
        return self.ask("squeue", "--noheader", "--format=%i").split()

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm prints; empty where it failed."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def stop(self) -> None:
        """End every job and every server."""
        if "slurmctld" in self.processes:
            self.ask("scancel", "--full", "--signal=KILL", *self.active())
            self.ask("scancel", *self.active())
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.active(), "the jobs to end")
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*parent_guard.command(), *command], env=self.environment, stdout=log, stderr=log
            )


def wait_for(condition: Callable[[], bool], what: str, within_s: float = DEADLINE_S) -> None:
    """Wait until a condition holds; fail with its name."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """Run a cluster for the length of the block, for this process too."""
    slurm = Slurm(folder)
    before = os.environ.get("SLURM_CONF")
    try:
        slurm.start()
        os.environ["SLURM_CONF"] = str(slurm.conf)
        yield slurm
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        slurm.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as taken:
        probes = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


if __name__ == "__main__":
    with running(Path(sys.argv[1])) as cluster:
        print(f"SLURM_CONF={cluster.conf}", flush=True)
        sys.stdin.read()
