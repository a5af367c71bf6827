"""Slurm: every stage is a batch job, submitted with `sbatch` from wherever the run is at work.

The request travels inside the job's script, which Slurm shows to its owner alone. Events and log are written to
`jobs/` in the store, which the nodes share. The job is found again by its comment, so a run that was killed between
`sbatch` and its own next line loses nothing.

Slurm tells the script before the time is over (USR1): the stage saves, ends with 75 and the script puts the job into
the queue again. It also requeues a job whose node failed. What a stage on several nodes starts on the others, it
starts itself (`pipelines/core/nodes.py`).
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from flows import executors
from flows.executors import EVENTS, Job, Status
from pipelines.core import program
from pipelines.core.compute import ComputeConfig, Resources, seconds_of
from pipelines.core.errors import ConfigError, IngotError, Preempted, TransientError
from pipelines.core.request import StageRequest
from pipelines.core.store import SCHEME, open_store

LOG = "log"
_COMMENT = "ingot"
_KEY_DIGITS = 32
_ASK_S = 60.0
"""How long a command of Slurm may take."""
_LOOK_S = 2.0
"""Least time between looks at the queue, for all jobs together."""
_UNREACHABLE_S = 600.0
"""How long the controller may be away: jobs go on meanwhile."""
_SAVE_MARGIN_S = 30
"""How much earlier than `grace_s` before its end a job is told: Slurm's own clock is coarse."""
_KILL_S = 10.0
_SHELL_SIGNAL = 128
"""A shell ends with this and the number of the signal that killed what it waited for."""
_TAIL_LINES = 20
_KEPT_S = 24 * 3600.0
_AWAY = re.compile(r"unable to contact|timed out|connection (refused|failure)|zero bytes", re.IGNORECASE)
_ENDS = {"COMPLETING", "STAGE_OUT"}
_RUNS = {"RUNNING", "SIGNALING", *_ENDS}
_WAITS = {"PENDING", "CONFIGURING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING"}
_WAITS |= {"RESV_DEL_HOLD", "SPECIAL_EXIT"}

_SCRIPT = """\
#!/bin/bash
# {node} {fingerprint}
{variables}
stage= told= requeue=
trap 'told=1 requeue=1; [ -z "$stage" ] || kill -TERM "$stage" 2>/dev/null' USR1  # its time is nearly over
trap 'told=1; [ -z "$stage" ] || kill -TERM "$stage" 2>/dev/null' TERM INT
[ -z "$told" ] || exit 75
request() {{ cat <<'{mark}'
{request}
{mark}
}}
{command} - < <(request) >> {events} &
stage=$!
[ -z "$told" ] || kill -TERM "$stage"
until wait "$stage"; ! kill -0 "$stage" 2>/dev/null; do :; done
wait "$stage"
code=$?
if [ "$code" = 75 ] && [ -n "$requeue" ]; then
  trap 'exit 75' TERM
  scontrol requeue "$SLURM_JOB_ID" && {{ sleep 60 & wait; }}
fi
exit "$code"
"""


class Executor(executors.Executor):
    """Carries requests out as jobs of Slurm."""

    reads: ClassVar[frozenset[str]] = frozenset(Resources.model_fields)

    def __init__(self, compute: ComputeConfig) -> None:
        super().__init__(compute)
        self._queue = _Queue()

    def submit(self, request: StageRequest) -> Job:
        """Submit a batch job."""
        root = _jobs_folder(request)
        self._sweep(root, request)
        folder = root / f"{request.stage}-{request.fingerprint[:12]}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        options = [
            *_options(request),
            f"--comment={_comment(request)}{folder.name}",
            f"--output={_plain(folder / LOG)}",
        ]
        told = _slurm("sbatch", "--parsable", *options, text=_script(request, folder))
        return Job(told.strip().split(";")[0], request, folder)

    def poll(self, job: Job) -> Status:
        """Return what Slurm says of the job, at most a few seconds old."""
        row = self._queue.row(job.id)
        name = f"Slurm's job {job.id} of {job.request.node}"
        if row is None:
            return Status("ended", cause=TransientError(f"{name} is gone: Slurm no longer knows it"))
        if row.state in _RUNS:
            return Status("ends" if row.state in _ENDS else "runs", note=f"Slurm's job {job.id} runs on {row.nodes}")
        if row.state in _WAITS:
            return Status("waits", note=f"Slurm's job {job.id} waits ({row.reason})")
        if row.state in {"COMPLETED", "FAILED"}:
            return Status("ended", _exit_code(job.id))
        return Status("ended", cause=_cause(row.state, name))

    def cancel(self, jobs: Sequence[Job], grace_s: float) -> None:
        """Have the stages save, as before the end of their time; then kill what is left on every node."""
        ids = [job.id for job in jobs]
        _slurm("scancel", "--state=PENDING", *ids)
        _slurm("scancel", "--batch", "--signal=TERM", *ids, quiet=True)
        if not self._queue.ended(ids, grace_s):
            _slurm("scancel", "--full", "--signal=KILL", *ids, quiet=True)
            _slurm("scancel", *ids, quiet=True)
            self._queue.ended(ids, _KILL_S)

    def logs(self, job: Job) -> str:
        """Return the last lines of the job's log."""
        try:
            lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])

    def adopt(self, request: StageRequest) -> Job | None:
        """Return the job in the queue whose comment names the fingerprint."""
        wanted = _comment(request)
        for row in self._queue.rows(max_age_s=0.0).values():
            if row.comment.startswith(wanted) and row.state in {"RUNNING", *_WAITS}:
                return Job(row.id, request, _jobs_folder(request) / row.comment.removeprefix(wanted), adopted=True)
        return None

    def release(self, job: Job, done: bool) -> None:
        """Remove the folder of a job whose artifact is there; that of another one keeps its log."""
        if done:
            shutil.rmtree(job.folder, ignore_errors=True)

    def described(self, request: StageRequest) -> str:
        """Return the command that would submit the job, without the request."""
        return shlex.join(["sbatch", *_options(request)])

    def where(self, request: StageRequest) -> str:
        """Return what the job asks for."""
        compute = request.compute
        parts = [f"{compute.node_count} {'node' if compute.node_count == 1 else 'nodes'}"]
        parts += [f"cores {compute.cpus}"] if compute.cpus else []
        parts += [f"GPUs {compute.gpus_per_node}"] if compute.gpus_per_node else []
        parts += [f"{compute.node_memory:g} GB"] if compute.node_memory else []
        parts += [f"for {compute.time}"] if compute.time else []
        parts += [f"in {compute.partition}"] if compute.partition else []
        parts += ["alone on its node"] if request.alone else []
        return f"slurm, {', '.join(parts)}"

    def problems(self, requests: Iterable[StageRequest]) -> Iterator[str]:
        """Yield why Slurm would refuse jobs (`sbatch --test-only`), and what could not work there."""
        requests = list(requests)
        for each in requests:
            machines = each.compute.node_count
            if each.compute.container is not None and machines > 1:
                yield f"{each.node}: compute.container goes with one node, not {machines}: an image calls no srun"
        alike: dict[tuple[str, ...], list[str]] = {}  # but for their names
        for each in requests:
            alike.setdefault(tuple(_options(each)[1:]), []).append(each.node)
        refused: dict[str, list[str]] = {}
        for options, nodes in alike.items():
            try:
                _slurm("sbatch", "--test-only", *options, text="#!/bin/bash\n")
            except (ConfigError, TransientError) as error:
                refused.setdefault(error.message, []).extend(nodes)
        for message, nodes in refused.items():
            yield f"{', '.join(dict.fromkeys(nodes))}: {message}"

    def _sweep(self, root: Path, request: StageRequest) -> None:
        """Remove folders of jobs that are over: of this stage at once, of others after a day."""
        active = {row.comment.rpartition(":")[2] for row in self._queue.rows().values() if row.state in _RUNS | _WAITS}
        same = f"{request.stage}-{request.fingerprint[:12]}-"
        for folder in root.glob("*-*"):
            try:
                facts = folder.stat()
            except FileNotFoundError:
                continue  # its job has just ended, and was released
            old = time.time() - facts.st_mtime > _KEPT_S
            if facts.st_uid == os.getuid() and folder.name not in active and (old or folder.name.startswith(same)):
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Row:
    """A line of the queue."""

    id: str
    state: str
    reason: str
    nodes: str
    comment: str


class _Queue:
    """This user's jobs as Slurm last told them; one question serves all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, _Row] = {}
        self._asked_at = self._told_at = -1e9

    def rows(self, max_age_s: float = _LOOK_S) -> dict[str, _Row]:
        """Return the jobs by id, also those that ended lately.

        Raises:
            TransientError: the controller has not answered for ten minutes, or never has.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._asked_at > max_age_s:
                self._asked_at = now
                try:
                    told = _slurm("squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%r|%N|%k")
                except TransientError:
                    if now - self._told_at > _UNREACHABLE_S:
                        raise
                else:
                    rows = [_Row(*line.split("|", 4)) for line in told.splitlines() if line.count("|") >= 4]
                    self._rows, self._told_at = {row.id: row for row in rows}, now
            return self._rows

    def row(self, job: str) -> _Row | None:
        """Return one job; None if Slurm, asked anew, does not know it."""
        return self.rows().get(job) or self.rows(max_age_s=0.0).get(job)

    def ended(self, jobs: Iterable[str], within_s: float) -> bool:
        """Wait until none of these jobs is in the queue; return whether that came true in time."""
        deadline, pause = time.monotonic() + within_s, threading.Event()
        while True:
            rows = self.rows(max_age_s=0.2)
            if not any(rows[job].state in _RUNS | _WAITS for job in jobs if job in rows):
                return True
            if time.monotonic() > deadline:
                return False
            pause.wait(0.2)


def _jobs_folder(request: StageRequest) -> Path:
    """Return where jobs have their folders, on disks that the nodes share: in the store, or else in the project."""
    if request.store.startswith(SCHEME):
        return Path(request.project or Path.cwd()) / ".ingot" / "jobs"
    return Path(request.store) / "jobs"


def _comment(request: StageRequest) -> str:
    return f"{_COMMENT}:{request.fingerprint[:_KEY_DIGITS]}:"


def _plain(path: Path) -> str:
    """Return a path in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")


def _options(request: StageRequest) -> list[str]:
    """Return what `sbatch` is told, the job's name first."""
    compute = request.compute
    asked = {
        "--job-name": f"ingot-{request.node}",
        "--nodes": compute.node_count,
        "--ntasks-per-node": 1,
        "--cpus-per-task": compute.cpus,
        "--gpus-per-node": compute.gpus_per_node or None,
        "--mem": None if compute.node_memory is None else f"{compute.node_memory * 1e9 / 2**20:.0f}M",
        "--time": None if compute.time is None else seconds_of(compute.time) // 60,
        "--partition": compute.partition,
        "--account": compute.account,
        "--signal": f"B:USR1@{round(compute.grace_s) + _SAVE_MARGIN_S}",
        "--open-mode": "append",
        "--chdir": request.project or str(Path.cwd()),
    }
    flags = ["--requeue", *(["--exclusive"] if request.alone else [])]
    return [*(f"{name}={value}" for name, value in asked.items() if value is not None), *flags]


def _script(request: StageRequest, folder: Path) -> str:
    mark = f"END-{secrets.token_hex(8)}"
    variables = {"PYTHONPATH": program.environment()["PYTHONPATH"]}
    if request.compute.cpus is not None:
        variables["OMP_NUM_THREADS"] = str(request.compute.cpus)
    return _SCRIPT.format(
        node=request.node,
        fingerprint=request.fingerprint,
        variables="\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        command=shlex.join(_command(request)),
        events=shlex.quote(str(folder / EVENTS)),
        request=request.model_dump_json(),
        mark=mark,
    )


def _command(request: StageRequest) -> list[str]:
    """Return the command of the stage, in its image if it has one, where the folders have the same names as here."""
    command = program.command("pipelines.core.run_stage")
    image = request.compute.container
    if image is None:
        return command
    folders = sorted({str(program.ROOT), str(open_store(request.store).root), request.project or str(Path.cwd())})
    gpu = ["--nv"] if request.compute.gpus_per_node else []
    return ["apptainer", "exec", *gpu, *(f"--bind={folder}" for folder in folders), image, "python3", *command[1:]]


def _cause(state: str, name: str) -> IngotError:
    again = "the same command goes on where it stopped"
    if state in {"CANCELLED", "PREEMPTED"}:
        return Preempted(f"{name} was {state.lower()}", hint=again)
    if state == "OUT_OF_MEMORY":
        return ConfigError(f"{name} took more memory than it had", hint="compute.node_memory=GB asks for more")
    if state in {"TIMEOUT", "DEADLINE"}:
        return TransientError(
            f"{name} was not done in time", hint=f"{again}; compute.time and compute.grace_s give more"
        )
    return TransientError(f"{name} ended as {state}", hint=again)


def _exit_code(job: str) -> int | None:
    found = re.search(r"\bExitCode=(\d+):(\d+)", _slurm("scontrol", "show", "job", job, quiet=True))
    if found is None:
        return None
    code, signum = int(found[1]), int(found[2])
    return -signum if signum else _SHELL_SIGNAL - code if code > _SHELL_SIGNAL else code


def _slurm(*command: str, text: str | None = None, quiet: bool = False) -> str:
    """Return what a command of Slurm prints.

    Args:
        command: program and arguments.
        text: for its standard input.
        quiet: whether a refusal is no error: the job has ended meanwhile.

    Raises:
        ConfigError: Slurm is not here, or refuses.
        TransientError: its controller does not answer.
    """
    # What a job that this process runs in was given would be taken for wishes.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run(command, input=text, env=variables, capture_output=True, text=True, timeout=_ASK_S)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {command[0]} here: compute.executor = slurm needs Slurm's commands",
            hint="run it on a login node of the cluster",
        ) from None
    except subprocess.TimeoutExpired:
        raise TransientError(f"{command[0]} has not answered for {_ASK_S:g} s") from None
    if done.returncode == 0 or (quiet and not _AWAY.search(done.stderr)):
        return done.stdout
    said = " ".join(line.removeprefix(f"{command[0]}: error: ") for line in done.stderr.splitlines()) or "no reason"
    if _AWAY.search(done.stderr):
        raise TransientError(f"Slurm's controller does not answer {getpass.getuser()}: {said}")
    raise ConfigError(f"Slurm refuses: {said}", hint="`ingot plan --jobs` shows the job; `sinfo` what there is")
