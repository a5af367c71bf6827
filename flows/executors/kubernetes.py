"""Kubernetes: every stage is a JobSet (`jobset.x-k8s.io/v1alpha2`), made by `kubectl` in the namespace of its context.

One pod is one node of the stage. The first executes it; the others wait for it at its stable name, which JobSet gives
(`pipelines/core/nodes.py`). The request travels in a Secret, since it may hold a password. Pods share no disk, so the
store is on S3; the image has the program, and the project in its working folder. Credentials (`AWS_*`, `MLFLOW_*`) come
from a Secret called `ingot`, where there is one.

A pod that was evicted, or whose node was lost, has the whole JobSet start again, and the stage goes on from its newest
checkpoint in the store. Every other end is the run's to judge.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from flows import executors
from flows.executors import EVENTS, Job, Status
from pipelines.core import parent_guard
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, Preempted, TransientError
from pipelines.core.request import StageRequest
from pipelines.core.store import SCHEME

_PORT = 29400
_NAME, _KEY = "app.kubernetes.io/name", "ingot/fingerprint"
_CREDENTIALS = "ingot"
_KEY_DIGITS = 32
_RESTARTS = 10
"""How often a JobSet starts again after lost nodes."""
_AGAIN = (Preempted.exit_code, 137, 143)
"""Exit codes with which a pod ends that was evicted: saved, killed, terminated."""
_SAVE_MARGIN_S = 30
_ASK_S = 60.0
_LOOK_S = 2.0
_UNREACHABLE_S = 600.0
_TAIL_LINES = 20
_START = """\
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then exec python3 -P -m pipelines.core.run_stage /ingot/request.json; fi
exec python3 -P -m pipelines.core.node --rendezvous "$INGOT_RENDEZVOUS" --nodes {nodes} \
--node-rank "$JOB_COMPLETION_INDEX"
"""


class Executor(executors.Executor):
    """Carries requests out as JobSets."""

    reads: ClassVar[frozenset[str]] = frozenset(
        {"nodes", "gpus_per_node", "cpus", "node_memory", "partition", "container"}
    )

    def __init__(self, compute: ComputeConfig) -> None:
        super().__init__(compute)
        self._asking = threading.Lock()
        self._sets: dict[str, dict[str, Any]] = {}
        self._asked_at = self._told_at = -1e9
        self._followers: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, request: StageRequest) -> Job:
        """Create the Secret and the JobSet."""
        if found := [*self.problems([request])]:
            raise ConfigError(found[0])
        name = f"ingot-{request.stage}-{secrets.token_hex(4)}"
        _kubectl("create", "--filename=-", text=yaml.safe_dump_all([_secret(name, request), manifest(name, request)]))
        self._asked_at = -1e9
        return Job(name, request, Path(tempfile.mkdtemp(prefix="ingot-job-")))

    def poll(self, job: Job) -> Status:
        """Return what the JobSet says of itself, and have the log of its first pod followed."""
        found = self._known().get(job.id)
        name = f"the JobSet {job.id} of {job.request.node}"
        if found is None:
            return Status("ended", cause=TransientError(f"{name} is gone: it was deleted"))
        status = found.get("status", {})
        self._follow_log(job)
        if status.get("terminalState") == "Completed":
            return self._ended(job, Status("ended", 0))
        if status.get("terminalState") == "Failed":
            return self._ended(job, Status("ended", 1))
        at_work = any(each.get("active") for each in status.get("replicatedJobsStatus", []))
        return Status("runs" if at_work else "waits", note=f"{name} {'runs' if at_work else 'waits'}")

    def cancel(self, jobs: Sequence[Job], grace_s: float) -> None:
        """Delete the JobSets: each pod gets SIGTERM, and as long as its manifest says to save."""
        names = [job.id for job in jobs]
        wait = f"--timeout={grace_s + 2 * _SAVE_MARGIN_S:.0f}s"
        _kubectl("delete", "jobsets,secrets", *names, "--ignore-not-found", "--cascade=foreground", wait, wait_s=600.0)

    def logs(self, job: Job) -> str:
        """Return the last lines of the log of the first pod."""
        with contextlib.suppress(ConfigError, TransientError):
            return _kubectl("logs", f"--selector={_first_pod(job.id)}", f"--tail={_TAIL_LINES}")
        return ""

    def adopt(self, request: StageRequest) -> Job | None:
        """Return the JobSet with the label of the fingerprint that has not ended, or None."""
        for name, found in self._known(max_age_s=0.0).items():
            own = found["metadata"]["labels"].get(_KEY) == request.fingerprint[:_KEY_DIGITS]
            if own and "terminalState" not in found.get("status", {}) and "deletionTimestamp" not in found["metadata"]:
                return Job(name, request, Path(tempfile.mkdtemp(prefix="ingot-job-")), adopted=True)
        return None

    def release(self, job: Job, done: bool) -> None:
        """Delete the Secret, and the JobSet of a stage whose artifact is there; that of another one keeps its log."""
        if (follower := self._followers.pop(job.id, None)) is not None:
            follower.kill()
            follower.wait()
        kinds = "jobsets,secrets" if done else "secrets"
        with contextlib.suppress(ConfigError, TransientError):
            _kubectl("delete", kinds, job.id, "--ignore-not-found", "--wait=false")
        shutil.rmtree(job.folder, ignore_errors=True)

    def described(self, request: StageRequest) -> str:
        """Return the manifest of the JobSet."""
        return yaml.safe_dump(manifest(f"ingot-{request.stage}", request), sort_keys=False)

    def where(self, request: StageRequest) -> str:
        """Return what the pods ask for."""
        compute = request.compute
        parts = [f"{compute.node_count} {'pod' if compute.node_count == 1 else 'pods'}"]
        parts += [f"cores {compute.cpus}"] if compute.cpus else []
        parts += [f"GPUs {compute.gpus_per_node}"] if compute.gpus_per_node else []
        parts += [f"{compute.node_memory:g} GB"] if compute.node_memory else []
        parts += [f"in the queue {compute.partition}"] if compute.partition else []
        return f"kubernetes, {', '.join(parts)}"

    def problems(self, requests: Iterable[StageRequest]) -> Iterator[str]:
        """Yield what could not work in pods."""
        requests = list(requests)
        if without := [each.node for each in requests if each.compute.container is None]:
            yield f"{', '.join(without)}: compute.container names no image with the program and the project"
        if any(not each.store.startswith(SCHEME) for each in requests):
            yield "pods share no disk: store.path=s3://BUCKET/PREFIX"
        if alone := [each.node for each in requests if each.alone and each.compute.cpus is None]:
            yield f"{', '.join(alone)}: measures time, so compute.stages.NAME.cpus has to reserve its cores"

    def _known(self, max_age_s: float = _LOOK_S) -> dict[str, dict[str, Any]]:
        """Return Ingot's JobSets by name; one question serves all threads.

        Raises:
            TransientError: the API server has not answered for minutes: jobs go on meanwhile.
        """
        with self._asking:
            now = time.monotonic()
            if now - self._asked_at > max_age_s:
                self._asked_at = now
                try:
                    told = _kubectl("get", "jobsets", f"--selector={_NAME}=ingot", "--output=json")
                except TransientError:
                    if now - self._told_at > _UNREACHABLE_S:
                        raise
                else:
                    self._sets = {each["metadata"]["name"]: each for each in json.loads(told)["items"]}
                    self._told_at = now
            return self._sets

    def _follow_log(self, job: Job) -> None:
        """Have what the stage prints in the job's folder; the command ends with the pod, and is started anew."""
        follower = self._followers.get(job.id)
        if follower is None or follower.poll() is not None:
            command = ["kubectl", "logs", "--follow", f"--selector={_first_pod(job.id)}", "--tail=-1"]
            with (job.folder / EVENTS).open("ab") as events:
                self._followers[job.id] = subprocess.Popen(
                    [*parent_guard.command(), *command], stdout=events, stderr=subprocess.DEVNULL
                )

    def _ended(self, job: Job, status: Status) -> Status:
        """Return the end of a job once its log has been read to its own end."""
        with contextlib.suppress(KeyError, subprocess.TimeoutExpired):
            self._followers[job.id].wait(10)
        return status


def manifest(name: str, request: StageRequest) -> dict[str, Any]:
    """Return the JobSet of a request.

    Args:
        name: of the JobSet, and of the Secret that has the request.
        request: what the pods execute.
    """
    compute, count = request.compute, request.compute.node_count
    wanted: dict[str, str] = {}
    if compute.cpus is not None:
        wanted["cpu"] = str(compute.cpus)
    if compute.node_memory is not None:
        wanted["memory"] = f"{compute.node_memory * 1e9:.0f}"
    if compute.gpus_per_node:
        wanted["nvidia.com/gpu"] = str(compute.gpus_per_node)
    variables = {"INGOT_CACHE": "/cache", "INGOT_RENDEZVOUS": f"{name}-node-0-0.{name}:{_PORT}"}
    if compute.cpus is not None:
        variables["OMP_NUM_THREADS"] = str(compute.cpus)
    key = {"name": "INGOT_RENDEZVOUS_KEY", "valueFrom": {"secretKeyRef": {"name": name, "key": "rendezvous"}}}
    container = {
        "name": "stage",
        "image": compute.container or "IMAGE",
        "command": ["/bin/sh", "-c", _START.format(nodes=count)],
        "env": [*({"name": name, "value": value} for name, value in variables.items()), key],
        "envFrom": [{"secretRef": {"name": _CREDENTIALS, "optional": True}}],
        "resources": {"requests": wanted, "limits": wanted},
        "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True},
        "volumeMounts": [
            {"name": "request", "mountPath": "/ingot", "readOnly": True},
            {"name": "cache", "mountPath": "/cache"},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": round(compute.grace_s) + _SAVE_MARGIN_S,
        "containers": [container],
        "volumes": [
            {"name": "request", "secret": {"secretName": name}},
            {"name": "cache", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    job = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": sorted(_AGAIN)}},
            ]
        },
        "template": {"metadata": {"labels": _labels(request)}, "spec": pod},
    }
    queue = {} if compute.partition is None else {"kueue.x-k8s.io/queue-name": compute.partition}
    rule = {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "labels": _labels(request) | queue},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": _RESTARTS, "rules": [rule]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _secret(name: str, request: StageRequest) -> dict[str, Any]:
    there = request.model_copy(update={"project": None})  # that of the image's working folder
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": _labels(request)},
        "stringData": {"request.json": there.model_dump_json(), "rendezvous": secrets.token_hex(32)},
    }


def _labels(request: StageRequest) -> dict[str, str]:
    return {_NAME: "ingot", _KEY: request.fingerprint[:_KEY_DIGITS]}


def _first_pod(name: str) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"


def _kubectl(*arguments: str, text: str | None = None, wait_s: float = _ASK_S) -> str:
    """Return what `kubectl` prints.

    Raises:
        ConfigError: it is not here, or the API server refuses.
        TransientError: the API server does not answer.
    """
    try:
        done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, timeout=wait_s)
    except FileNotFoundError:
        raise ConfigError(
            "there is no kubectl here: compute.executor = kubernetes needs it", hint="install it, and choose a context"
        ) from None
    except subprocess.TimeoutExpired:
        raise TransientError(f"kubectl {arguments[0]} has not ended for {wait_s:g} s") from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or "no reason"
    if any(sign in said for sign in ("was refused", "timed out", "no such host", "i/o timeout", "ServiceUnavailable")):
        raise TransientError(f"the Kubernetes API server does not answer: {said}")
    raise ConfigError(f"Kubernetes refuses: {said}", hint="`ingot plan --jobs` shows the manifest")
