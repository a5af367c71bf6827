"""`ingot resume` goes on with exactly the runs of which `ingot status` says so, with all that they were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import console, run_plan
from flows.commands import run as run_command
from flows.commands import show as show_command
from flows.planner import Selection
from flows.run_plan import RunPlan
from flows.run_record import Runs
from flows.runner import begin
from pipelines.core.errors import ConfigError


@pytest.mark.parametrize("status", ["done", "refused"])
def test_a_run_that_came_to_its_end_is_not_gone_on_with(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    runs = Runs(tmp_path)
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    runs.finish(record, status, 0)
    show_command.status(None, follow=False, as_json=False)
    assert "ingot resume" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no unfinished run"):
        run_command.resume(None, as_json=False)
    with pytest.raises(ConfigError, match=f"{record.id} is finished"):
        run_command.resume(record.id, as_json=False)


def test_a_run_at_work_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    record = Runs(tmp_path).start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    with pytest.raises(ConfigError, match=f"{record.id} is at work \\(process"):
        run_command.resume(record.id, as_json=False)
    with pytest.raises(ConfigError, match="there is no unfinished run"):
        run_command.resume(None, as_json=False)


def test_status_offers_to_go_on_with_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    runs = Runs(tmp_path)
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    runs.finish(record, "failed", 4)
    show_command.status(None, follow=False, as_json=False)
    assert f"Go on with: ingot resume {record.id}" in capsys.readouterr().out


@pytest.fixture
def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPlan]:
    """Return a function that begins a run of a recipe, lets it fail, and returns the plan that `resume` carries out."""
    monkeypatch.setenv("INGOT_STORE", str(tmp_path / "store"))

    def go_on(made: RunPlan, *, done: tuple[str, ...] = (), **changes: Any) -> RunPlan:
        runs = Runs(made.store.root)
        record = begin(made, runs)
        for name in done:
            record.nodes[name].state = "done"
        runs.finish(record, "failed", 4)
        path = runs.folder(record.id) / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        plans: list[RunPlan] = []
        monkeypatch.setattr(run_command, "_run_flow", lambda *arguments: plans.append(arguments[0]))
        monkeypatch.setattr(run_command, "_summary", lambda *_arguments, **_named: None)
        run_command.resume(None, as_json=False)
        return plans[0]

    return go_on


def fingerprints(plan: RunPlan) -> dict[str, str]:
    return {name: node.fingerprint for name, node in plan.graph.items()}


def test_a_run_is_gone_on_with_as_it_was_asked_for_though_its_recipe_is_gone_and_the_folder_is_another(
    resumed: Callable[..., RunPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "smoke"\n[pretrain]\nsteps = 12\nschedule.warmup = 1\n')
    selection = Selection(only="prepare", force=("prepare",))
    made = run_plan.make(str(mine), ["pretrain.seed=5"], selection)
    mine.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan = resumed(made)
    assert plan.config == made.config
    assert plan.selection == selection
    assert fingerprints(plan) == fingerprints(made)
    assert plan.wanted() == ["prepare"]


def test_what_was_forced_and_is_done_is_not_forced_once_more(resumed: Callable[..., RunPlan]) -> None:
    made = run_plan.make("smoke", [], Selection(since="pretrain"))
    plan = resumed(made, done=("pretrain",))
    forced = {name for name, node in plan.graph.items() if plan.selection.forced(node, plan.graph)}
    assert {name for name, node in made.graph.items() if made.selection.forced(node, made.graph)} - forced == {
        "pretrain"
    }
    assert "evaluate.pretrain" in forced


def test_a_record_of_an_older_version_is_gone_on_with_and_what_is_assumed_is_said(
    resumed: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    made = run_plan.make("smoke", ["pretrain.seed=5"])
    plan = resumed(made, selection=None, settings={})
    assert fingerprints(plan) == fingerprints(made)
    older = Runs(made.store.root).all()[0].id
    changed = run_plan.make(older, ["pretrain.seed=6"])
    assert fingerprints(changed) == fingerprints(run_plan.make("smoke", ["pretrain.seed=6"]))
    assert "was recorded by a version that kept no selection: all its stages are meant" in said[0]


def test_a_run_is_repeated_by_its_id(resumed: Callable[..., RunPlan]) -> None:
    made = run_plan.make("smoke", ["pretrain.seed=5"])
    resumed(made)
    run = Runs(made.store.root).get().id
    again = run_plan.make(run)
    assert (again.recipe, again.overrides) == ("smoke", ("pretrain.seed=5",))
    assert (again.config, fingerprints(again)) == (made.config, fingerprints(made))
    changed = run_plan.make(run, ["compress.bits=4"])
    assert fingerprints(changed)["pretrain"] == fingerprints(made)["pretrain"]
    assert fingerprints(changed) == fingerprints(run_plan.make("smoke", ["pretrain.seed=5", "compress.bits=4"]))
