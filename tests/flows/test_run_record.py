"""Run records: written whole, found by the beginning of their id, and honest about runs that were killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.run_record import PARETO, NodeRecord, RunRecord, Runs
from pipelines.core.errors import ConfigError


def start(runs: Runs, recipe: str = "smoke") -> RunRecord:
    """A run that begins now."""
    nodes = {"prepare": NodeRecord(stage="prepare", fingerprint="0" * 64)}
    return runs.start(recipe=recipe, overrides=["a=1"], config={"a": 1}, data_hash="d", nodes=nodes)


def test_a_started_run_is_running_and_alive(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    assert runs.get() == record
    assert record.alive()
    assert record.id.endswith("-smoke")


def test_two_runs_in_one_second_have_ids_of_their_own(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert len({start(runs).id for _ in range(3)}) == 3


def test_a_recipe_by_path_names_the_run_after_its_file(tmp_path: Path) -> None:
    assert start(Runs(tmp_path), "some/where/mine.toml").id.endswith("-mine")


def test_a_finished_run_says_how_it_ended(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    runs.finish(record, "refused", 7, "too large")
    found = runs.get(record.id)
    assert (found.status, found.exit_code, found.error) == ("refused", 7, "too large")
    assert found.finished_at is not None
    assert not found.alive()


def test_a_run_whose_process_is_gone_is_not_alive(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    record = start(Runs(tmp_path)).model_copy(update={"pid": ended.pid})
    assert record.status == "running"
    assert not record.alive()


def test_a_run_on_another_host_is_believed(tmp_path: Path) -> None:
    assert start(Runs(tmp_path)).model_copy(update={"host": "elsewhere", "pid": 1}).alive()


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    assert runs.get(record.id[:15]) == record


def test_an_ambiguous_beginning_is_refused(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    start(runs)
    start(runs, "demo")
    with pytest.raises(ConfigError, match="names 2 runs"):
        runs.get("2")


@pytest.mark.parametrize("asked", [None, "2026"])
def test_no_run_is_a_clear_error(tmp_path: Path, asked: str | None) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        Runs(tmp_path).get(asked)


def test_the_children_of_a_run_are_read_where_its_report_put_them(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    assert runs.pareto(record.id) == []
    (runs.folder(record.id) / PARETO).write_text('[{"model": "int4"}]')
    assert runs.pareto(record.id) == [{"model": "int4"}]


def test_saving_leaves_no_temporary_file(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    runs.save(record)
    assert [path.name for path in runs.folder(record.id).iterdir()] == ["run.json"]


def test_a_command_that_was_cut_off_goes_on_from_the_weights_it_began_with(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    record.init_weights = "models:/x/3"
    runs.save(record)
    found = runs.unfinished("smoke", ["a=1"])
    assert found is not None
    assert found.pin(["a=1"]) == ["a=1", "pretrain.from=models:/x/3"]
    assert found.pin(found.pin(["a=1"])) == found.pin(["a=1"])
    again = record.model_copy(update={"id": record.id + "-again", "overrides": found.pin(["a=1"])})
    runs.save(again)
    assert runs.unfinished("smoke", ["a=1"]) == again
    assert runs.unfinished("smoke", ["a=2"]) is None
    assert runs.unfinished("demo", ["a=1"]) is None


@pytest.mark.parametrize("status", ["done", "refused"])
def test_a_command_that_came_to_its_end_begins_anew(status: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.finish(start(runs), status, 0)
    assert runs.unfinished("smoke", ["a=1"]) is None
    assert start(runs).pin(["a=1"]) == ["a=1"]
