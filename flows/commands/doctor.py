"""doctor: what this machine has, what it lacks, and the command that gets it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from flows import console, preflight, recipe, run_plan
from flows.commands import lookup
from flows.config import StoreConfig
from pipelines.core import disk, machine, program, project, quantity
from pipelines.core.errors import ConfigError, IngotError
from pipelines.core.redaction import redact, redact_value
from pipelines.core.store import SCHEME
from pipelines.data import cache, versioning
from pipelines.data.config import DataConfig

_PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "prefect", "mlflow", "dvc", "lm-eval", "fastapi")
_PREFIXES = ("INGOT_", "MLFLOW_", "PREFECT_", "NCCL_", "SLURM_")
_VARIABLES = ("AWS_PROFILE", "AWS_ENDPOINT_URL", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
_DISK_WANTED = 5_000_000_000


def link_cache() -> None:
    """Let the corpus of this project and DVC's cache share the disk, and say so.

    Raises:
        ConfigError: the disk cannot, or there is no project.
    """
    root = project.find()
    said = cache.link(_data_of(root), root)
    print(f"DVC's cache is linked by {said['cache']}; files of the corpus are {said['files']}")


def doctor(*, as_json: bool) -> None:
    """Print every check; a failed one carries the command that mends it.

    Raises:
        ConfigError: something is missing.
    """
    rows = [
        _row("platform", f"{platform.platform()}, {platform.machine()}"),
        _python(),
        *(_package(name) for name in _PACKAGES),
        *_pins(),
        _git(),
        _program(),
        _project(),
        _disk(),
        _store(),
        _memory(),
        _row("gpu", ", ".join(f"{name} ({quantity.size(memory)})" for name, memory in machine.gpus_here()) or "none"),
        _row("environment", ", ".join(_environment()) or "nothing set"),
        _loopback(),
        _corpus(),
        *_cache(),
        *_preflight(),
    ]
    console.table(rows, ["check", "state", "value", "do"], as_json=as_json)
    missing = [row["check"] for row in rows if row["state"] == "missing"]
    if missing:
        raise ConfigError(f"not ready: {', '.join(missing)}", hint="the last column says what to do")


def _row(check: str, value: str, *, ok: bool = True, do: str = "") -> dict[str, Any]:
    return {"check": check, "state": "ok" if ok else "missing", "value": value, "do": "" if ok else do}


def _environment() -> list[str]:
    """Return the variables that change what a command does, without what may be secret in them."""
    names = sorted(name for name in os.environ if name.startswith(_PREFIXES) or name in _VARIABLES)
    return [f"{name}={redact_value(name, redact(os.environ[name]))}" for name in names]


def _python() -> dict[str, Any]:
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    return _row("python", platform.python_version(), ok=ok, do="use Python 3.11 or 3.12")


def _package(name: str) -> dict[str, Any]:
    try:
        return _row(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _row(name, "-", ok=False, do="make setup")


def _pins() -> list[dict[str, Any]]:
    """Name the installed versions that differ from the tested set."""
    constraints = (program.ROOT / "flows" / "constraints.txt").read_text(encoding="utf-8")
    tested = dict(line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    other = [
        f"{name} {importlib.metadata.version(name)} (tested {tested[name]})"
        for name in _PACKAGES
        if name in tested and importlib.metadata.version(name).split("+")[0] != tested[name]
    ]
    return [_row("tested set", ", ".join(other) or "all of it", ok=not other, do="make setup")]


def _git() -> dict[str, Any]:
    found = shutil.which("git")
    return _row("git", found or "-", ok=found is not None, do="install git: DVC and provenance need it")


def _program() -> dict[str, Any]:
    return _row("program", f"{program.commit()[:12] if program.is_checkout() else program.commit()}, {program.ROOT}")


def _project() -> dict[str, Any]:
    found = project.find_any()
    do = "`ingot new NAME --data FOLDER`, or go into a project"
    return _row("project", str(found or "none here"), ok=found is not None, do=do)


def _disk() -> dict[str, Any]:
    free = disk.free(project.find_any() or Path.cwd())
    return _row("disk", f"{quantity.size(free)} free", ok=free > _DISK_WANTED, do="free 5 GB, or `ingot gc`")


def _store() -> dict[str, Any]:
    """Say where the store is; one on S3 is asked."""
    said = StoreConfig().path
    if project.find_any() is None and not (said.startswith(SCHEME) or Path(said).is_absolute()):
        return _row("store", f"{said} of a project; none here")
    try:
        store = lookup.store()
        count = sum(1 for _ in store.artifacts())
    except IngotError as error:
        return _row("store", error.message, ok=False, do=error.hint or "correct store.path or INGOT_STORE")
    on_s3 = store.address.startswith(SCHEME)
    return _row("store", f"{store.address}, {count} artifacts" + (f", copies in {store.root}" if on_s3 else ""))


def _memory() -> dict[str, Any]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _row("memory", f"{quantity.size(total)}, {os.cpu_count()} cores", ok=total > 4e9, do="4 GB is the least")


def _loopback() -> dict[str, Any]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        return _row("loopback port", "free ports can be had")
    except OSError as error:
        return _row("loopback port", str(error), ok=False, do="allow this user to listen on 127.0.0.1")


def _data_of(root: Path) -> DataConfig:
    """Return what the project's own recipe says of its corpus."""
    name, overrides = recipe.from_here(None, [], root)
    return recipe.resolve(name, overrides, root).data


def _corpus() -> dict[str, Any]:
    try:
        root = project.find()
        told = versioning.status(_data_of(root), root)
    except IngotError as error:
        return _row("corpus", error.message, ok=False, do=error.hint or "ingot data pull")
    shown = f"work tree {told['work_tree']}; remote {told['remote']}"
    return _row("corpus", shown, ok="do" not in told, do=str(told.get("do")))


def _cache() -> list[dict[str, Any]]:
    """Say where the corpus takes the disk twice, which is no fault."""
    root = project.find_any()
    if root is None or not (root / ".dvc").is_dir():
        return []
    if not cache.takes_twice(root):
        return [_row("dvc cache", "the corpus takes the disk once, or the disk can do no better")]
    row = _row("dvc cache", "the corpus takes the disk twice: in the work tree and in .dvc/cache")
    return [row | {"do": "`ingot doctor --link-cache` lets them share it"}]


def _preflight() -> list[dict[str, Any]]:
    """Ask of the project's own recipe what every run is asked before it starts."""
    if project.find_any() is None:
        return []
    try:
        plan = run_plan.make()
    except IngotError as error:
        return [_row("recipe", error.message, ok=False, do=error.hint or "`ingot plan`")]
    rows = []
    for name, asks in preflight.CHECKS.items():
        findings = list(asks(plan))
        rows += [_row(f"{plan.recipe}: {name}", f.message, ok=f.error is None, do=f.do) for f in findings]
        rows += [] if findings else [_row(f"{plan.recipe}: {name}", "nothing against it")]
    return rows
