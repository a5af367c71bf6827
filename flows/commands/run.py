"""plan, run, resume, promote: the verbs that walk the graph."""

from __future__ import annotations

import json
import os
import signal
from types import FrameType
from typing import Any, NoReturn

from flows import console, run_plan
from flows.commands import lookup
from flows.planner import Selection
from flows.run_plan import RunPlan
from flows.run_record import REPORT, Runs
from pipelines.core.errors import ConfigError, Preempted
from pipelines.core.provenance import CHECKOUT
from pipelines.data import versioning
from pipelines.registry import history

# Progress is told by our own lines; the bars and hints of libraries would only tear them apart.
_QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TOKENIZERS_PARALLELISM": "false",
}
_LONGEST_SHOWN = 24


def plan(
    name: str, overrides: list[str], only: str | None, since: str | None, force: list[str], *, as_json: bool
) -> None:
    """Print the plan of a run."""
    made = run_plan.make(name, overrides, Selection(only, since, tuple(force)))
    if as_json:
        print(json.dumps([step.as_dict() for step in made.steps], indent=1))
        return
    _print_plan(made)
    print("Nothing was started.")


def run(
    name: str,
    overrides: list[str],
    only: str | None,
    since: str | None,
    force: list[str],
    *,
    wait_s: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a recipe; a run with nothing to do is answered from the plan, before any flow or model code loads."""
    console.set_quiet(quiet)
    made = run_plan.make(name, overrides, Selection(only, since, tuple(force)))
    data = made.config.data
    if data.rev is None and (CHECKOUT / data.path).exists():
        # Also when everything is cached: a corpus that was changed by accident is never passed over in silence.
        versioning.verify(data, CHECKOUT)
    if made.is_done():
        _report_cached(made, as_json=as_json)
        return
    if not quiet and not as_json:
        _print_plan(made)
    _summary(_run_flow(made, wait_s), made, as_json=as_json)


def resume(run_id: str | None, *, as_json: bool, quiet: bool) -> None:
    """Run an unfinished run's recipe again; every finished stage is found in the store, every other one goes on.

    Raises:
        ConfigError: the run is finished, or still at work.
    """
    runs = Runs(lookup.store().root)
    if run_id is None:
        unfinished = [run.id for run in runs.all() if run.unfinished]
        if not unfinished:
            raise ConfigError("there is no unfinished run", hint="`ingot list runs` shows all of them")
        run_id = unfinished[-1]
    record = runs.get(run_id)
    if record.at_work:
        raise ConfigError(f"{record.id} is at work ({record.process})", hint="`ingot status`")
    if not record.unfinished:
        raise ConfigError(f"{record.id} is finished ({record.status})", hint=f"`ingot run -r {record.recipe}`")
    run(record.recipe, record.command(), None, None, [], wait_s=None, as_json=as_json, quiet=quiet)


def promote(candidate: str | None, run_id: str | None, *, as_json: bool) -> None:
    """Put a model of a finished run through the gate."""
    record = Runs(lookup.store().root).get(run_id)
    overrides = record.command() + ([f"promote.candidate={candidate}"] if candidate else [])
    run(record.recipe, overrides, "promote", None, ["promote"], wait_s=None, as_json=as_json, quiet=False)


def _run_flow(plan: RunPlan, wait_s: float | None) -> str:
    """Execute the Prefect flow in this process, with a server of its own if none is configured."""
    from flows.prefect_server import api

    console.say("starting Prefect ...")
    for key, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(key, value)
    # Prefect catches SIGTERM during a flow and then passes it on to the handler that was there before: this one.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _stop)
    with api(plan.store.root):
        from flows.train_to_registry import run_planned

        return run_planned(plan, wait_s)


def _stop(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise Preempted("the run was asked to stop", hint="the same command goes on where it stopped")


def _print_plan(made: RunPlan) -> None:
    steps = made.steps
    rows = [
        {"stage": s.node, "state": s.state, "why": s.why, "estimate": console.duration(s.estimate_s)} for s in steps
    ]
    console.table(rows, ["stage", "state", "why", "estimate"], as_json=False)
    for step in steps:
        if step.warning:
            print(f"  note: {step.node}: {step.warning}")
    cached = sum(s.state == "cached" for s in steps)
    to_run = [s for s in steps if s.state in {"run", "waits"}]
    known = [s.estimate_s for s in to_run if s.estimate_s is not None]
    time = f", about {console.duration(sum(known))}" if to_run and len(known) == len(to_run) else ""
    disk = f", {console.size(sum(s.size or 0 for s in to_run))}" if known else ""
    print(f"{cached} cached, {len(to_run)} to run{time}{disk}. {_champion_line(made)}")


def _champion_line(made: RunPlan) -> str:
    model = made.config.promote.model_name
    champion = history.champion(made.store.root, model)
    if champion is None:
        return f"{model} has no champion yet."
    quality = champion.get("bits_per_byte")
    measured = f" ({quality:.3f} bits/byte)" if isinstance(quality, float) else ""
    return f"Champion of {model}: v{champion['version']}{measured}."


def _report_cached(made: RunPlan, *, as_json: bool) -> None:
    if as_json:
        champion = history.champion(made.store.root, made.config.promote.model_name)
        rows = [step.as_dict() for step in made.steps]
        print(json.dumps({"status": "cached", "steps": rows, "champion": champion}, indent=1, default=str))
        return
    _print_plan(made)
    print("Everything is cached: nothing was run.")


def _summary(run_id: str, made: RunPlan, *, as_json: bool) -> None:
    """Print what a finished run leaves: the stages with their headline numbers, the champion, where to look."""
    runs = Runs(made.store.root)
    record, report = runs.get(run_id), runs.folder(run_id) / REPORT
    champion = history.champion(made.store.root, made.config.promote.model_name)
    if as_json:
        facts: dict[str, Any] = record.model_dump() | {"champion": champion, "report": str(report)}
        print(json.dumps(facts, indent=1, default=str))
        return
    rows = [
        {"stage": n, "state": r.state, "took": console.duration(r.seconds), "result": headline(r.summary)}
        for n, r in record.nodes.items()
    ]
    console.table(rows, ["stage", "state", "took", "result"], as_json=False)
    print(_champion_line(made))
    print(f"Report: {report}")
    if record.tracking_url:
        print(f"MLflow: {record.tracking_url}")
    if record.tracking_pending:
        print(f"MLflow lacks a part of this run, which `ingot sync` sends: {record.tracking_problem}")


def headline(summary: dict[str, Any]) -> str:
    """Return the first few facts of a stage summary in one line, numbers first."""
    numbers = {k: f"{v:.4g}" for k, v in summary.items() if isinstance(v, float)}
    numbers |= {k: str(v) for k, v in summary.items() if isinstance(v, int) and not isinstance(v, bool)}
    words = {k: v for k, v in summary.items() if isinstance(v, str) and len(v) <= _LONGEST_SHOWN}
    return ", ".join(f"{key} {value}" for key, value in list((numbers | words).items())[:4])
