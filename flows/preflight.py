"""What can be known before a run starts, asked before Prefect is: `ingot plan`, `run` and `doctor` share these checks.

A finding that is certain refuses the run, with the exit code that the run would have ended with hours later; one that
only may come true is said. Each names what to do.
"""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import executors, prefect_server
from flows.run_plan import RunPlan
from models.architectures.config import Family
from pipelines.compression import suitability
from pipelines.core import boundary, disk
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, DiskFullError, IngotError, IntegrityError, TransientError
from pipelines.core.machine import gpu_count
from pipelines.core.store import SCHEME
from pipelines.data import reader, versioning
from pipelines.evaluation import probe
from pipelines.modelio import folder
from pipelines.registry import current, evidence, history, initial_weights
from pipelines.tracking.config import resolve_uri
from pipelines.training import tokens
from pipelines.training.config import PretrainConfig

_OWN_NAME = "promote.model_name=NAME gives this model a name of its own; or see promote.allow_new_test_set"
_ASSUMED_TWICE = 2
"""A stage whose bytes rest on assumptions is refused where not even half of them fit."""
_LOOKED_AT = 2000
"""Files of a corpus that are looked into before a run; prepare looks into all."""
_AGAIN = "it will be measured again on that of this run"
COMPUTES = {"pretrain", "compress", "evaluate"}
"""Stages whose work goes to a device."""


@dataclass(frozen=True)
class Finding:
    """Something that speaks against a run."""

    check: str
    message: str
    do: str
    error: type[IngotError] | None
    """What the run is refused with; None where it may still come out well."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; `exit_code` is that of the refusal, None where there is none."""
        code = None if self.error is None else self.error.exit_code
        return {"check": self.check, "message": self.message, "do": self.do, "exit_code": code}

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.do}"


def check(plan: RunPlan, *, elsewhere: bool = False) -> list[Finding]:
    """Return what speaks against a run.

    Args:
        plan: the run.
        elsewhere: the plan is for a machine that is not this one, of which nothing is known.
    """
    away = elsewhere or plan.config.compute.executor != "local"
    checks = [each for name, each in CHECKS.items() if not (away and name in _OF_THE_MACHINE)]
    return list(itertools.chain.from_iterable(each(plan) for each in checks))


def refuse(findings: list[Finding]) -> None:
    """Raise the error of the findings that are certain, all of them in its message.

    Raises:
        IngotError: of the class of the first one.
    """
    certain = [finding for finding in findings if finding.error is not None]
    if certain:
        *others, last = certain
        kind = certain[0].error or IngotError
        raise kind("\n".join([*map(str, others), last.message]), hint=last.do)


def corpus(plan: RunPlan) -> Iterator[Finding]:
    """Is the corpus in the work tree the one that data.dvc names? Also asked when everything is cached."""
    settings = plan.config.data
    if settings.rev is not None:
        return
    if (plan.project / settings.path).exists():
        try:
            versioning.verify(settings, plan.project)
        except IntegrityError as error:
            yield Finding("corpus", error.message, error.hint or "`ingot data status`", IntegrityError)
    elif _runs(plan, "prepare") and not versioning.can_be_pulled(settings, plan.project):
        yield Finding(
            "corpus",
            f"{plan.project / settings.path} is not here, and the project names no DVC remote to bring it from",
            "put it back; or `dvc remote add -d NAME URL`",
            None,
        )


def reading(plan: RunPlan) -> Iterator[Finding]:
    """Can every file of the corpus be read, as far as its first records tell?"""
    settings, folder = plan.config.data, plan.project / plan.config.data.path
    if settings.rev is not None or not folder.exists() or not _runs(plan, "prepare"):
        return
    try:
        names = reader.relative_names(folder, plan.project)
        reader.refuse_unread(
            reader.inspect(folder, names[:: max(1, len(names) // _LOOKED_AT)], plan.config.prepare), folder
        )
    except IntegrityError as error:
        yield Finding("reading", error.message, error.hint or "`ingot data check`", IntegrityError)


def model_name(plan: RunPlan) -> Iterator[Finding]:
    """Has the registered model a champion that this run's model cannot, or was not meant to, be compared with?

    A champion of other text is measured again at the end; an encoder with another tokenizer cannot be.
    """
    settings = plan.config.promote
    if settings.allow_new_test_set or not _runs(plan, "promote"):
        return
    try:
        champion = current.champion(plan.config.tracking, plan.store.root, settings.model_name)
    except TransientError:
        return  # the plan says that the champion is unknown
    if champion is None:
        return
    name = f"the champion {settings.model_name} v{champion['version']}"
    known, ours = _measured_on(champion, plan), _stored(plan, "prepare")
    family = family_of(plan)
    if known.family not in {None, family}:
        message = f"{name} is of the family {known.family}, this run's model of {family}: the gate would refuse it"
        yield Finding("model name", message, _OWN_NAME, ConfigError)
    elif ours is not None and None not in (known.text, known.tokenizer):
        other_text = evidence.test_digest(ours) != known.text
        if other_text and family == "encoder" and _tokenizer_of(ours, "tokenizer") != known.tokenizer:
            message = f"{name} has other held-out text and another tokenizer: the gate could compare nothing"
            yield Finding("model name", message, _OWN_NAME, ConfigError)
        elif other_text:
            yield Finding("model name", f"{name} was measured on other held-out text; {_AGAIN}", _OWN_NAME, None)
    elif known.data not in {None, plan.data_hash}:
        change = f"{str(known.data)[:8]}, now {plan.data_hash[:8]}"
        message = f"{name} was measured on another corpus ({change}); if the held-out text differs too, {_AGAIN}"
        yield Finding("model name", message, _OWN_NAME, None)


@dataclass(frozen=True)
class _Known:
    """What is known here of a champion; each None where it is not."""

    family: str | None
    text: str | None
    """Digest of its held-out text."""
    data: str | None
    """DVC hash of its corpus."""
    tokenizer: str | None
    """sha256 of its tokenizer."""


def _measured_on(champion: history.Record, plan: RunPlan) -> _Known:
    """Return what a champion's record tells, and where that is of an older version, what the store tells."""
    stored = {each.manifest.fingerprint: each for each in plan.store.artifacts()}
    model = stored.get(str(champion.get("fingerprint")))
    text, data = champion.get("test_digest"), champion.get("dvc_hash")
    if model is not None:
        made = model.manifest.provenance
        data = data or (made.data_hash if made else None)
        prepared = stored.get(_prepared_by(model) or "")
        text = text or (evidence.test_digest(prepared) if prepared else None)
    return _Known(champion.get("family"), text, data, _tokenizer_of(model, "model") if model else None)


def _tokenizer_of(made: Artifact, folder: str) -> str | None:
    record = made.manifest.files.get(f"{folder}/{tokens.TOKENIZER}")
    return None if record is None else record.sha256


def held_out(plan: RunPlan) -> Iterator[Finding]:
    """Will the models be measured on as many documents as the gate wants?"""
    prepared, wanted = _stored(plan, "prepare"), plan.config.promote.min_documents
    if not _runs(plan, "promote"):
        return
    counts = {"evaluate.max_documents": plan.config.evaluate.max_documents}
    if prepared is not None:
        counts["the test split"] = int(prepared.manifest.summary.get("test_documents", wanted))
    for what, count in counts.items():
        if count is not None and count < wanted:
            message = f"{what} has {count} documents, promote.min_documents = {wanted}: the gate would refuse any model"
            do = "raise prepare.test_fraction or evaluate.max_documents, add documents, or lower promote.min_documents"
            yield Finding("held-out text", message, do, ConfigError)


def gpus(plan: RunPlan) -> Iterator[Finding]:
    """Are there the GPUs that the recipe asks for?"""
    compute, ranks = plan.config.compute, plan.config.pretrain.world_size if plan.config.trains else 1
    if compute.device == "cpu" or not any(step.runs and step.stage in COMPUTES for step in plan.steps):
        return
    there, build = gpu_count(), importlib.metadata.version("torch").partition("+")[2]
    if build.startswith("rocm"):
        return  # the driver of NVIDIA does not know of them
    training = _runs(plan, "pretrain")
    if compute.device == "cuda" and (there == 0 or build == "cpu"):
        found = "the installed torch is built for the CPU alone" if build == "cpu" else "this machine has none"
        yield Finding("gpu", f"compute.device = cuda, but {found}", "compute.device=cpu", ConfigError)
    elif training and 0 < there < ranks and build != "cpu":
        do = f"pretrain.world_size={there}, or compute.device=cpu"
        yield Finding("gpu", f"pretrain.world_size = {ranks}, but there are {there} GPUs here", do, ConfigError)
    elif training and there == 0 and plan.config.pretrain.precision != "fp32":
        message = f"no GPU here: {ranks} ranks compute in {plan.config.pretrain.precision} on the CPU"
        yield Finding("gpu", message, "run it where GPUs are; compute.device=cuda refuses to do without", None)


def space(plan: RunPlan) -> Iterator[Finding]:
    """Has the disk room for what runs?"""
    free = disk.free(plan.store.root)
    running = [step for step in plan.steps if step.runs and step.estimate.disk_bytes is not None]
    needed = [(step.estimate.disk_bytes or 0) - disk.size_of(_scratch(plan, step.node)) for step in running]
    for step, size in zip(running, needed, strict=True):
        if size > free * (1 if step.estimate.disk_exact else _ASSUMED_TWICE):
            message = f"{step.node} needs up to {size:,} bytes in {plan.store.root}, {free:,} are free"
            yield Finding("disk", message, disk.HINT, DiskFullError)
            return
    if sum(needed) > free:
        message = f"what runs takes up to {sum(needed):,} bytes in {plan.store.root}, {free:,} are free"
        yield Finding("disk", message, disk.HINT, None)


def writable(plan: RunPlan) -> Iterator[Finding]:
    """May this process write to the store, or make it?"""
    place = next(each for each in (plan.store.root, *plan.store.root.parents) if os.path.lexists(each))
    if not place.is_dir():
        message = f"{place} is not a folder, so {plan.store.root} cannot be the store"
        yield Finding("store", message, "store.path=FOLDER or INGOT_STORE=FOLDER names another", ConfigError)
    elif not os.access(place, os.W_OK | os.X_OK):
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        known = boundary.known(error) or ConfigError(str(error))
        yield Finding("store", f"the store cannot be written to: {known.message}", known.hint or "", ConfigError)


def parents(plan: RunPlan) -> Iterator[Finding]:
    """With `--only`: is what the stage reads there?"""
    wanted = plan.wanted()
    sources = {source for name in wanted for source in plan.graph[name].node.inputs.values()}
    if missing := [name for name in plan.graph if name in sources - {*wanted} and _stored(plan, name) is None]:
        first = next(name for name in plan.graph if _stored(plan, name) is None)
        yield Finding(
            "inputs",
            f"--only {plan.selection.only}: {', '.join(missing)} {'was' if len(missing) == 1 else 'were'} not run yet",
            f"run without --only, or `--only {first}` first",
            ConfigError,
        )


def tokenizer(plan: RunPlan) -> Iterator[Finding]:
    """Do the weights to start from mean the same tokens as the corpus?"""
    source = plan.init_weights
    if source is None or plan.config.prepare.tokenizer == "init_weights" or not _runs(plan, "pretrain"):
        return
    origin = next((each for each in plan.store.artifacts() if each.manifest.fingerprint == source.origin), None)
    model = origin.path / "model" if origin is not None else Path(source.place)
    prepared = _stored(plan, "prepare")
    if prepared is not None and model.is_dir():
        try:
            tokens.refuse_other_tokens(model, prepared.path / "tokenizer")
        except ConfigError as error:
            yield Finding("tokenizer", error.message, error.hint or "", ConfigError)
    elif prepared is None and not (origin and _prepared_by(origin) == plan.graph["prepare"].fingerprint):
        message = "this run trains a tokenizer of its own, and the model to start from most likely has another one"
        yield Finding("tokenizer", message, "prepare.tokenizer=init_weights takes the model's", None)


def jobs(plan: RunPlan) -> Iterator[Finding]:
    """Would the scheduler take the jobs, and does every resource that is asked for mean something to it?"""
    executor, compute = executors.get(plan.config.compute), plan.config.compute
    tables = {"compute": compute} | {f"compute.stages.{name}": table for name, table in compute.stages.items()}
    idle = [f"{path}.{key}" for path, table in tables.items() for key in table.asked if key not in executor.reads]
    if idle:
        message = f"{', '.join(idle)}: nothing reads that with compute.executor = {compute.executor}"
        if any(path.endswith(".nodes") for path in idle) and executor.one_machine:
            yield Finding("jobs", message, "compute.executor=slurm, or leave compute.nodes out", ConfigError)
        else:
            yield Finding("jobs", message, "leave it out, or choose another executor: `ingot list executors`", None)
    requests = [plan.request(step.node) for step in plan.steps if step.runs]
    for problem in executor.problems(requests):
        yield Finding("jobs", problem, "`ingot plan --jobs` shows what would be submitted", ConfigError)


def base(plan: RunPlan) -> Iterator[Finding]:
    """Can the model that the run starts from be measured, compressed and trained on as the recipe says?"""
    source = plan.init_weights
    if source is None or plan.config.trains or not any(_runs(plan, stage) for stage in COMPUTES):
        return
    place = Path(source.place)
    length = max(plan.config.prepare.sequence_length, plan.config.evaluate.context or 0)
    found = suitability.problems(
        source.config,
        plan.config.compress,
        folder=initial_weights.model_folder(place) if place.is_dir() else None,
        length=length,
    )
    for message, do in found:
        yield Finding("base", f"base.from = {source.place}: {message}", do, ConfigError)
    for name, settings in plan.config.evaluate.probes.items():
        family = folder.family_in(source.config)
        if settings.enabled and family and (reason := probe.get(name).misfit(settings, family)):
            yield Finding("base", f"evaluate.probes.{name}: {reason}", f"leave out evaluate.probes.{name}", ConfigError)


def family_of(plan: RunPlan) -> Family | None:
    """Return the family of the run's models; None of a model from elsewhere that predicts no tokens."""
    if plan.init_weights is None or plan.config.trains:
        settings = plan.graph["pretrain"].node.config
        return settings.family if isinstance(settings, PretrainConfig) else None
    return folder.family_in(plan.init_weights.config)


def _prepared_by(model: Artifact) -> str | None:
    """Return the fingerprint of the prepared corpus that a model descends from."""
    inputs = model.manifest.identity.get("inputs", {})
    return inputs.get("prepare")


def _runs(plan: RunPlan, stage: str) -> bool:
    return any(step.runs and step.stage == stage for step in plan.steps)


def _stored(plan: RunPlan, node: str) -> Artifact | None:
    return plan.store.find(plan.graph[node].node.stage.name, plan.graph[node].fingerprint)


def _scratch(plan: RunPlan, node: str) -> Path:
    return plan.store.scratch(plan.graph[node].node.stage.name, plan.graph[node].resume_key)


def several_machines(plan: RunPlan) -> Iterator[Finding]:
    """Do all machines of a store on S3 see one registry?"""
    if not plan.store.address.startswith(SCHEME):
        return
    uri = resolve_uri(plan.config.tracking, plan.store.root)
    if str(plan.store.root) in uri:
        message = f"the store is on S3, but MLflow's database is {uri}: other machines do not see runs and models there"
        do = "tracking.uri=URI of a server or database that all of them reach"
        yield Finding("several machines", message, do, None)


def slots(plan: RunPlan) -> Iterator[Finding]:
    """Is there a server that the slots of `compute.concurrency_limit` could come from?"""
    name = plan.config.compute.concurrency_limit
    if name is not None and prefect_server.configured_url() is None:
        message = f"compute.concurrency_limit = {name!r}, but no Prefect server is configured that could have it"
        do = "`prefect config set PREFECT_API_URL=URL`; or compute.concurrency_limit=none"
        yield Finding("slots", message, do, ConfigError)


CHECKS: dict[str, Callable[[RunPlan], Iterator[Finding]]] = {
    "corpus": corpus,
    "store": writable,
    "reading": reading,
    "inputs": parents,
    "held-out text": held_out,
    "model name": model_name,
    "tokenizer": tokenizer,
    "base": base,
    "gpu": gpus,
    "disk": space,
    "several machines": several_machines,
    "jobs": jobs,
    "slots": slots,
}
"""Name of a check -> the check."""
_OF_THE_MACHINE = {"gpu", "disk", "store"}
