"""Run records: written whole, found by the beginning of their id, and honest about runs that were killed."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows import console
from flows.run_record import PARETO, NodeRecord, RunRecord, Runs
from pipelines.core import lock
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.processes import ProcessName, this_process
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.core.store import open_store


def start(runs: Runs, recipe: str = "smoke") -> RunRecord:
    """A run that begins now."""
    nodes = {"prepare": NodeRecord(stage="prepare", fingerprint="0" * 64)}
    return runs.start(recipe=recipe, overrides=["a=1"], config={"a": 1}, data_hash="d", nodes=nodes)


def test_a_started_run_is_running_and_alive(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    assert runs.get() == record
    assert record.at_work
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
    assert not found.at_work


def test_a_run_on_s3_is_seen_from_a_machine_that_has_nothing_but_the_store(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Runs(open_store(s3_store).root)
    first, second = start(here), start(here)
    first.nodes["prepare"].done = 3
    here.save(first)
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path / "other"))
    there = Runs(open_store(s3_store).root)
    assert there.root != here.root
    assert [run.id for run in there.all()] == there.ids() == [first.id, second.id]
    assert there.get(first.id).nodes["prepare"].done == 3
    assert there.get(first.id).at_work
    here.finish(first, "done", 0)
    assert there.get(first.id).state == "done"
    assert [run.id for run in there.unfinished()] == []  # the other is at work
    here.finish(second, "failed", 1, "too large")
    assert [run.id for run in there.unfinished()] == [second.id]
    assert there.remove(second.id) > 0
    assert here.ids() == [first.id]


SECRET = ["pretrain.steps=2", "tracking.uri=http://u:c4n4ry@host:5000"]


def test_a_password_stands_in_no_record_and_the_same_command_still_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path)
    config = {"tracking": {"uri": "http://u:c4n4ry@host:5000"}}
    record = runs.start(recipe="smoke", overrides=SECRET, config=config, data_hash="d", nodes={})
    runs.finish(record, "failed", 4, "http://u:c4n4ry@host:5000 does not answer")
    assert "c4n4ry" not in (runs.folder(record.id) / "run.json").read_text()
    cut_off = runs.cut_off("smoke", SECRET)
    assert cut_off is not None
    assert cut_off.id == record.id
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"tracking.uri of run .* held a secret"):
        cut_off.table(full=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:c4n4ry@host:5000")
    assert cut_off.table(full=True) == {"tracking": {}}


def test_a_run_is_at_work_as_long_as_its_process_holds_its_lock(tmp_path: Path) -> None:
    """Seen by another process, and with a name of the process that says nothing: another host, another boot."""
    code = (
        "import sys; from pathlib import Path; from flows.run_record import Runs\n"
        "Runs(Path(sys.argv[1])).start(recipe='smoke', overrides=[], config={}, data_hash='d', nodes={})\n"
        "print('started', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        runs = Runs(tmp_path)
        record = runs.get()
        record.process = ProcessName(pid=1, host="elsewhere", start="another boot:1")
        runs.save(record)
        assert runs.get().at_work
        assert (runs.get().state, runs.get().unfinished) == ("running", False)
        process.kill()
        process.wait()
    assert not runs.get().at_work
    assert (runs.get().state, runs.get().unfinished) == ("killed", True)


def test_a_process_that_lives_is_no_run_at_work_without_the_lock(tmp_path: Path) -> None:
    """What a record says of its process is for messages: the id may be a stranger's by now."""
    record = start(Runs(tmp_path))
    elsewhere = Runs(tmp_path / "copy")
    elsewhere.save(record)
    assert record.process == this_process()
    assert elsewhere.get().state == "killed"


def test_those_who_ask_whether_a_run_is_at_work_do_not_see_one_another(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    path = runs.folder(record.id) / "run.lock"
    assert lock.is_held(path)
    runs.finish(record, "done", 0)
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)  # another one who asks at this moment
        assert not lock.is_held(path)


def test_one_damaged_record_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(False)
    runs = Runs(tmp_path)
    sound = start(runs)
    for name, text in (("torn", '{"id": "to'), ("wrong", '{"id": 1}'), ("list", "[]"), ("binary", "\udcff")):
        (runs.root / name).mkdir()
        (runs.root / name / "run.json").write_text(text, errors="surrogateescape")
    assert runs.all() == [sound]
    assert runs.all() == [sound]
    said = capsys.readouterr().err
    for name in ("torn", "wrong", "list", "binary"):
        assert said.count(f"the record {runs.root / name / 'run.json'} is damaged") == 1
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        runs.get("torn")
    assert caught.value.hint == "`ingot delete torn` removes it"


def test_a_run_that_a_newer_one_of_the_same_nodes_has_replaced_is_not_gone_on_with(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    first, second = start(runs), start(runs)
    for record in (first, second):
        runs.finish(record, "failed", 4)
    assert [run.id for run in runs.unfinished()] == [second.id]
    runs.finish(second, "done", 0)
    assert runs.unfinished() == []


@pytest.mark.parametrize(
    ("status", "unfinished"), [("done", False), ("refused", False), ("preempted", True), ("failed", True)]
)
def test_a_run_is_unfinished_unless_it_came_to_its_end(status: str, unfinished: bool, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    assert not record.unfinished
    assert runs.unfinished() == []
    runs.finish(record, status, 1)
    assert runs.get().unfinished == unfinished
    assert runs.get().state == status


def test_processes_that_start_in_the_same_second_never_share_a_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.run_record import Runs\n"
        "for _ in range(20):\n"
        "    print(Runs(Path(sys.argv[1])).start(recipe='smoke', overrides=[], config={}, data_hash='d', nodes={}).id)"
    )
    crowd = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ids = [line for process in crowd for line in process.communicate(timeout=60)[0].split()]
    assert len(ids) == len(set(ids)) == 60
    assert {run.id for run in Runs(tmp_path).all()} == set(ids)


def test_an_exact_id_is_meant_although_it_begins_others(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    first = start(runs)
    runs.save(first.model_copy(update={"id": first.id + "-2"}))
    assert runs.get(first.id) == first


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


def test_the_variants_of_a_run_are_read_where_its_report_put_them(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    assert runs.pareto(record.id) == []
    row = {"model": "int4", "method": "rtn", "bits_per_weight": 4.25, "size_bytes": 9, "best": True, "more": "kept"}
    row |= {"ratio": 1.1, "ratio_low": 1.0, "ratio_high": 1.2, "baselines": {"zeros": {"ratio": {"value": 2.0}}}}
    (runs.folder(record.id) / PARETO).write_text(json.dumps([row]))
    assert runs.pareto(record.id) == [row]
    (runs.folder(record.id) / PARETO).write_text('[{"model": "int4"}]')
    with pytest.raises(IntegrityError, match=r"pareto\.json is damaged"):
        runs.pareto(record.id)


def test_saving_leaves_no_temporary_file(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    runs.save(record)
    assert {path.name for path in runs.folder(record.id).iterdir()} == {"run.json", "run.lock", "run.holder"}
    runs.finish(record, "done", 0)
    assert "run.json" in {path.name for path in runs.folder(record.id).iterdir()} <= {"run.json", "run.lock"}


def test_a_command_that_was_cut_off_goes_on_from_the_weights_it_began_with(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = start(runs)
    record.init_weights = "models:/x/3"
    runs.save(record)
    found = runs.cut_off("smoke", ["a=1"])
    assert found is not None
    assert found.pin(["a=1"]) == ["a=1", "base.from=models:/x/3"]
    assert found.pin(found.pin(["a=1"])) == found.pin(["a=1"])
    again = record.model_copy(update={"id": record.id + "-again", "overrides": found.pin(["a=1"])})
    runs.save(again)
    assert runs.cut_off("smoke", ["a=1"]) == again
    assert runs.cut_off("smoke", ["a=2"]) is None
    assert runs.cut_off("demo", ["a=1"]) is None


@pytest.mark.parametrize("status", ["done", "refused"])
def test_a_command_that_came_to_its_end_begins_anew(status: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.finish(start(runs), status, 0)
    assert runs.cut_off("smoke", ["a=1"]) is None
    assert start(runs).pin(["a=1"]) == ["a=1"]


def test_the_last_of_a_recipe_is_node_for_node_what_its_newest_runs_made(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for recipe, states in (("mine", "done done"), ("mine", "cached failed"), ("other", "done done")):
        record = start(runs, recipe)
        record.nodes = {
            name: NodeRecord(stage=name, fingerprint=f"{name} of {record.id}", state=state)
            for name, state in zip(("prepare", "pretrain"), states.split(), strict=True)
        }
        runs.finish(record, "done", 0)
    first, second, _ = runs.all()
    assert runs.last_of("mine") == {"prepare": f"prepare of {second.id}", "pretrain": f"pretrain of {first.id}"}
    assert runs.last_of("nothing") == {}


def trained(runs: Runs, fingerprint: str, version: str | None, recipe: str = "smoke") -> RunRecord:
    """A run that has trained a model, and made it champion where there is a version."""
    summary = {} if version is None else {"model": "m", "version": version}
    nodes = {
        "pretrain": NodeRecord(stage="pretrain", fingerprint=fingerprint),
        "promote": NodeRecord(stage="promote", fingerprint="p", summary=summary),
    }
    record = runs.start(recipe=recipe, overrides=[], config={}, data_hash="d", nodes=nodes)
    runs.finish(record, "done", 0)
    return record


def test_the_champions_run_and_the_last_one_stand_beside_a_run(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    first, second, third = (trained(runs, print_, version) for print_, version in (("a", "1"), ("b", None), ("c", "2")))
    names = {name: run.id for name, run in runs.before(third, "m", ["1", "2"]).items()}
    assert names == {"champion v1": first.id, "last run": second.id}
    again = trained(runs, "c", None)
    assert {n: r.id for n, r in runs.before(again, "m", ["1", "2"]).items()} == names, (
        "the same model again is no other"
    )
    assert {n: r.id for n, r in runs.before(again, "other", ["1"]).items()} == {"last run": second.id}
