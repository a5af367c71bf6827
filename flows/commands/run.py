"""plan, run, resume, promote: the verbs that walk the graph."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from flows import console, executors, logs, preflight, recipe, run_plan
from flows.commands import lookup
from flows.planner import Selection, Step
from flows.run_plan import RunPlan
from flows.run_record import REPORT, RunRecord, Runs, SelectionRecord
from pipelines.core import project as projects
from pipelines.core import quantity
from pipelines.core.errors import ConfigError, TransientError
from pipelines.registry import current

# Progress is told by our own lines; the bars and hints of libraries would only tear them apart.
_QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_LOGS": "-all",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TOKENIZERS_PARALLELISM": "false",
}
_LONGEST_SHOWN = 24
HEADLINES = ("bits_per_byte", "validation_bits_per_byte", "ratio", "validation_loss")
"""What a result is judged by, first things first."""


def plan(
    name: str | None,
    overrides: list[str],
    only: str | None,
    since: str | None,
    force: list[str],
    *,
    as_json: bool,
    world_size: int | None = None,
    drawn: bool = False,
    jobs: bool = False,
) -> int:
    """Print the plan of a run; with `world_size` of a run on so many ranks of a machine that is not this one.

    Args:
        name: of the recipe.
        overrides: over the recipe.
        only: a stage to run alone.
        since: a stage to run again, with everything below.
        force: stages to run again.
        as_json: print JSON.
        world_size: ranks of another machine.
        drawn: print the graph instead.
        jobs: print what the executor would be given instead.

    Returns:
        The exit code with which a run would be refused; 0 if it would begin.

    Raises:
        ConfigError: a drawing is wanted as JSON, ranks for a recipe that trains nothing; or see `run_plan.make`.
    """
    if drawn and (as_json or jobs):
        raise ConfigError(
            "--graph prints Mermaid, --json and --jobs the steps and their jobs",
            hint="give one of the two",
        )
    quieten()
    if world_size is not None and not _trains(name, overrides):
        hint = "leave it out: its recipe has no section [pretrain]"
        raise ConfigError(f"--world-size {world_size}: this run trains nothing, so it has no ranks", hint=hint)
    ranks = [] if world_size is None else [f"pretrain.world_size={world_size}"]
    selection = Selection(only, since, tuple(force))
    made = run_plan.make(name, [*overrides, *ranks], selection, elsewhere=world_size is not None)
    if drawn:
        print(run_plan.mermaid(made))
        return 0
    if jobs:
        _print_jobs(made, as_json=as_json)
        return 0
    return show_plan(made, elsewhere=world_size is not None, as_json=as_json)


def _trains(name: str | None, overrides: list[str]) -> bool:
    root = projects.find()
    recipe_name, given = recipe.from_here(name, overrides, root)
    return recipe.resolve(recipe_name, given, root).trains


def _print_jobs(made: RunPlan, *, as_json: bool) -> None:
    """Print what the executor would be given for every stage that runs, and what the scheduler says of it."""
    executor = executors.get(made.config.compute)
    requests = [made.request(step.node) for step in made.steps if step.runs]
    rows = [{"stage": r.node, "where": executor.where(r), "job": executor.described(r)} for r in requests]
    problems = list(executor.problems(requests))
    if as_json:
        print(json.dumps({"jobs": rows, "problems": problems}, indent=1))
        return
    for row in rows:
        print(f"{row['stage']}: {row['where']}\n    {row['job']}")
    print("\n".join(f"would be refused: {each}" for each in problems) or "Nothing speaks against them.")


def run(
    name: str | None,
    overrides: list[str],
    only: str | None,
    since: str | None,
    force: list[str],
    *,
    wait_s: float | None,
    keep_going: bool,
    as_json: bool,
) -> None:
    """Run a recipe; a run with nothing to do is answered from the plan, before any flow or model code loads."""
    console.say("planning ...")
    quieten()
    made = run_plan.make(name, overrides, Selection(only, since, tuple(force), keep_going=keep_going))
    _carry_out(made, wait_s=wait_s, as_json=as_json)


def _carry_out(made: RunPlan, *, wait_s: float | None, as_json: bool) -> None:
    if (run_id := execute(made, wait_s=wait_s, as_json=as_json)) is None:
        _report_cached(made, as_json=as_json)
    else:
        _summary(run_id, made, as_json=as_json)


def execute(made: RunPlan, *, wait_s: float | None, as_json: bool) -> str | None:
    """Carry out a plan that nothing certain speaks against; return the id of the run, None where nothing was to do."""
    findings = _findings(made)
    preflight.refuse(findings)
    if made.is_done():
        return None
    if not console.is_quiet() and not as_json:
        print_plan(made)
    _say(findings, sys.stderr if console.is_quiet() or as_json else sys.stdout)
    return _run_flow(made, wait_s)


def show_plan(made: RunPlan, *, elsewhere: bool = False, as_json: bool, more: Mapping[str, Any] | None = None) -> int:
    """Print a plan and what speaks against it; return the exit code with which a run would be refused.

    Args:
        made: the plan.
        elsewhere: it is for a machine that is not this one.
        as_json: print JSON.
        more: what else the JSON says.
    """
    findings = _findings(made, elsewhere=elsewhere)
    code = next((each.error.exit_code for each in findings if each.error is not None), 0)
    if as_json:
        said = [each.as_dict() for each in findings]
        print(json.dumps({"steps": _rows(made), "findings": said, "exit_code": code, **(more or {})}, indent=1))
        return code
    print_plan(made)
    _say(findings, sys.stdout)
    print("Nothing was started.")
    return code


def resume(run_id: str | None, *, as_json: bool) -> None:
    """Go on with an unfinished run: its configuration and its selection are those of its record.

    Every finished stage is found in the store, every other one goes on. What the run was to force and has executed is
    not executed once more.

    Raises:
        ConfigError: the run is finished, or still at work.
    """
    runs = Runs(lookup.store().root)
    if run_id is None:
        unfinished = runs.unfinished()
        if not unfinished:
            raise ConfigError("there is no unfinished run", hint="`ingot list runs` shows all of them")
        run_id = unfinished[-1].id
    record = runs.get(run_id)
    if record.at_work:
        raise ConfigError(f"{record.id} is at work ({record.process})", hint="`ingot status`")
    if not record.unfinished:
        raise ConfigError(f"{record.id} is finished ({record.status})", hint=f"`ingot run --recipe {record.id}`")
    if record.selection is None:
        console.say(f"{record.id} was recorded by a version that kept no selection: all its stages are meant")
    made = run_plan.again(record, lookup.store(), {}, _selection_of(record))
    if made.data_hash != record.data_hash:
        console.say(f"the corpus has changed since {record.id} began: what reads it runs again")
    _carry_out(made, wait_s=None, as_json=as_json)


def _selection_of(record: RunRecord) -> Selection:
    """Return what a run was asked for, less the forced nodes that it has executed."""
    asked = record.selection or SelectionRecord()
    executed = [name for name, node in record.nodes.items() if node.state == "done" and name not in asked.finished]
    finished = (*asked.finished, *executed)
    return Selection(asked.only, asked.since, tuple(asked.force), finished, asked.keep_going)


def promote(candidate: str | None, run_id: str | None, *, as_json: bool) -> None:
    """Put a model of a finished run through the gate.

    Args:
        candidate: a model, as `lookup` finds it; None for the choice of the run's recipe.
        run_id: the run that made it; the newest that has it if left out.
        as_json: print JSON.
    """
    record, name = lookup.find_candidate(candidate, run_id)
    change = {"promote.enabled": "true"} | ({"promote.candidate": name} if name else {})
    made = run_plan.again(record, lookup.store(), change, Selection(only="promote", force=("promote",)))
    _carry_out(made, wait_s=None, as_json=as_json)


def _run_flow(plan: RunPlan, wait_s: float | None) -> str:
    """Execute the Prefect flow in this process, and tell the configured server of it, if there is one."""
    from flows import prefect_server

    quieten()
    logs.into(plan.store.root)
    server = prefect_server.prepare(plan.store.root)
    console.say(f"telling Prefect at {server}" if server else "no Prefect server is configured; running without one")
    from flows.train_to_registry import run_planned

    logs.take_back()
    return run_planned(plan, wait_s, server=server)


def _findings(made: RunPlan, *, elsewhere: bool = False) -> list[preflight.Finding]:
    """Return what speaks against a run: of one with nothing to do, a corpus that was changed by accident alone."""
    return list(preflight.corpus(made)) if made.is_done() else preflight.check(made, elsewhere=elsewhere)


def quieten() -> None:
    """Have libraries say errors only, where the user has not asked for more."""
    for key, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(key, value)


def _say(findings: list[preflight.Finding], stream: TextIO) -> None:
    """Print what speaks against a run."""
    for finding in findings:
        print(f"{'note' if finding.error is None else 'would be refused'}: {finding}", file=stream)


def _rows(made: RunPlan) -> list[dict[str, Any]]:
    """Return the steps as JSON values."""
    return [step.as_dict(made.config.compute.price_per_hour) for step in made.steps]


def print_plan(made: RunPlan) -> None:
    """Print the steps of a plan, and what they come to."""
    to_run = [step for step in made.steps if step.runs]
    console.table(
        [_row(step) for step in made.steps], ["stage", "state", "why", "time", "memory", "disk"], as_json=False
    )
    for step in made.steps:
        if step.warning:
            print(f"  note: {step.node}: {step.warning}")
    _print_sources(to_run)
    _print_mixture(to_run)
    cached = sum(step.state == "cached" for step in made.steps)
    executor = executors.get(made.config.compute)
    if not executor.one_machine and to_run:
        places = [(step.node, executor.where(made.request(step.node))) for step in to_run]
        groups = {place: [node for node, where in places if where == place] for _, place in places}
        print("  where: " + "; ".join(f"{', '.join(nodes)}: {place}" for place, nodes in groups.items()))
    print(f"{cached} cached, {len(to_run)} to run{_totals(made, to_run)}. {_champion_line(made)}".rstrip())
    if any(step.stage == "promote" for step in to_run):
        print(f"Gate: {made.config.promote.rule}.")


def _row(step: Step) -> dict[str, str]:
    """Return a line of the plan: what is done already takes nothing any more."""
    estimate, runs = step.estimate, step.runs
    memory = quantity.size(estimate.memory_bytes) if runs else "-"
    return {
        "stage": step.node,
        "state": step.state,
        "why": step.why,
        "time": quantity.duration(step.seconds),
        "memory": f"{estimate.ranks} x {memory}" if estimate.ranks > 1 and runs and estimate.memory_bytes else memory,
        "disk": quantity.size(estimate.disk_bytes) if runs else "-",
    }


def _print_sources(to_run: Sequence[Step]) -> None:
    """Say what the times rest on, and of the longest stage exactly."""
    timed = [(step, step.estimate.time) for step in to_run if step.estimate.time is not None]
    if not timed:
        return
    by_source: dict[str, list[str]] = {}
    for step, time in timed:
        by_source.setdefault(time.source, []).append(step.node)
    groups = [f"{source}: {', '.join(nodes)}" for source, nodes in sorted(by_source.items())]
    told = "; ".join(groups) if len(groups) > 1 else f"all {timed[0][1].source}"
    longest, time = max(timed, key=lambda each: each[1].seconds)
    print(f"  times: {told}. The longest, {longest.node}, is {time.source}: {time.basis}")


def _print_mixture(to_run: Sequence[Step]) -> None:
    """Say how much of each source each phase of the training takes."""
    rows = next((step.estimate.facts["mixture"] for step in to_run if "mixture" in step.estimate.facts), None)
    if rows is None:
        return
    if not rows:
        print("  mixture: tokens and epochs of each source are known once prepare is done")
        return
    shown = [
        {**row, "share": f"{row['share']:.1%}", "tokens": f"{row['tokens']:,}", "epochs": f"{row['epochs']:.3g}"}
        for row in rows
    ]
    print("  mixture, epochs counted over all phases until then:")
    console.table(shown, list(shown[0]), as_json=False)


def _totals(made: RunPlan, to_run: Sequence[Step]) -> str:
    """Return time, disk and cost of what runs, as far as they are known."""
    times = [step.seconds for step in to_run if step.seconds is not None]
    without = ", ".join(step.node for step in to_run if step.seconds is None)
    disk = [step.estimate.disk_bytes for step in to_run if step.estimate.disk_bytes is not None]
    price = made.config.compute.price_per_hour
    costs = [cost for step in to_run if (cost := step.estimate.cost(price)) is not None]
    parts = [
        f", about {quantity.duration(sum(times))}" + (f" without {without}" if without else "") if times else "",
        f", at most {quantity.size(sum(disk))} of disk" if disk else "",
        f", {sum(costs):.2f} at {price:g} a rank-hour" if costs else "",
    ]
    return "".join(parts)


def _champion_line(made: RunPlan) -> str:
    """Return a sentence on the champion; empty for a run that asks no gate."""
    model = made.config.promote.model_name
    if not made.config.promote.enabled:
        return ""
    try:
        champion = _champion(made)
    except TransientError as error:
        return f"The champion of {model} is unknown: {error.message}."
    if champion is None:
        return f"{model} has no champion yet."
    quality = champion.get("bits_per_byte")
    measured = f" ({quality:.3f} bits/byte)" if isinstance(quality, float) else ""
    return f"Champion of {model}: v{champion['version']}{measured}."


def _champion(made: RunPlan) -> dict[str, Any] | None:
    """Return what the registry's alias says at this moment; None for a run that asks no gate."""
    if not made.config.promote.enabled:
        return None
    return current.champion(made.config.tracking, made.store.root, made.config.promote.model_name)


def _report_cached(made: RunPlan, *, as_json: bool) -> None:
    if as_json:
        rows = _rows(made)
        print(json.dumps({"status": "cached", "steps": rows, "champion": _champion(made)}, indent=1, default=str))
        return
    print_plan(made)
    print("Everything is cached: nothing was run.")


def _summary(run_id: str, made: RunPlan, *, as_json: bool) -> None:
    """Print what a finished run leaves: the stages with their headline numbers, the champion, where to look."""
    runs = Runs(made.store.root)
    record, report = runs.get(run_id), runs.folder(run_id) / REPORT
    if as_json:
        facts: dict[str, Any] = record.model_dump() | {"champion": _champion(made), "report": str(report)}
        print(json.dumps(facts, indent=1, default=str))
        return
    rows = [
        {"stage": n, "state": r.state, "took": quantity.duration(r.seconds), "result": headline(r.summary)}
        for n, r in record.nodes.items()
    ]
    console.table(rows, ["stage", "state", "took", "result"], as_json=False)
    for name, node in record.nodes.items():
        if uninformative := node.summary.get("uninformative_tasks"):
            print(f"{name} does no better than chance in {', '.join(uninformative)}: that says nothing of the model.")
    if line := _champion_line(made):
        print(line)
    print(f"Report: {report}")
    if record.tracking_url:
        print(f"MLflow: {record.tracking_url}")
    if record.tracking_pending:
        print(f"MLflow lacks a part of this run, which `ingot sync` sends: {record.tracking_problem}")


def headline(summary: dict[str, Any]) -> str:
    """Return the first few facts of a stage summary in one line: headline numbers, other numbers, words.

    A truncated evaluation says so first: its numbers are not those of the whole test split.
    """
    summary = {key: summary[key] for key in HEADLINES if key in summary} | summary
    numbers = {k: f"{v:.{6 if k == 'ratio' else 4}g}" for k, v in summary.items() if isinstance(v, float)}
    numbers |= {k: str(v) for k, v in summary.items() if isinstance(v, int) and not isinstance(v, bool)}
    words = {k: v for k, v in summary.items() if isinstance(v, str) and len(v) <= _LONGEST_SHOWN}
    marks = ["truncated"] if summary.get("truncated") is True else []
    return ", ".join([*marks, *(f"{key} {value}" for key, value in list((numbers | words).items())[:4])])
