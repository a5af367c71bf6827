"""verify, gc and export on stores made by hand: what is damaged is named, what is needed stays."""

from __future__ import annotations

import io
import json
import os
import pty
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import list as list_command
from flows.commands import show as show_command
from flows.commands import store as store_command
from flows.run_record import NodeRecord, Runs
from pipelines.core import artifact, disk, fingerprint, quantity
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.store import LocalStore
from pipelines.registry import history

Made = Callable[..., Artifact]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """The store that the commands use."""
    monkeypatch.setenv("INGOT_STORE", str(tmp_path / "store"))
    return LocalStore(tmp_path / "store")


@pytest.fixture
def made(store: LocalStore) -> Made:
    """Publish an artifact of a node that reads others."""

    def publish(
        node: str, *parents: Artifact, content: str = "x", summary: dict[str, Any] | None = None, **named: Artifact
    ) -> Artifact:
        stage = node.partition(".")[0]
        build = store.build_folder(stage, node)
        (build / "out.txt").write_text(content)
        inputs = {p.manifest.node: p for p in parents} | named
        keys = {name: p.manifest.fingerprint for name, p in inputs.items()}
        identity: dict[str, Any] = {"node": node, "content": content, "inputs": keys}
        return artifact.publish(
            build,
            store.path(stage, fingerprint.digest(identity)),
            stage=stage,
            node=node,
            identity=identity,
            parents={name: p.digest for name, p in inputs.items()},
            summary=summary or {},
        )

    return publish


def remember(store: LocalStore, *found: Artifact) -> str:
    """Record a run that made these artifacts; returns its id."""
    nodes = {
        a.manifest.node: NodeRecord(
            stage=a.manifest.stage, fingerprint=a.manifest.fingerprint, state="done", artifact=str(a.path)
        )
        for a in found
    }
    runs = Runs(store.root)
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=nodes)
    runs.finish(record, "done", 0)
    return record.id


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_gc_keeps_what_the_newest_runs_descend_from_and_removes_the_rest(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run of the child alone (`--only compress`) needs parents that another, older run made."""
    prepare = made("prepare")
    parent, other = made("pretrain", prepare), made("pretrain", prepare, content="other")
    child = made("compress.rtn", parent)
    remember(store, prepare, other)
    remember(store, child)
    size = sum(path.stat().st_size for path in other.path.iterdir())
    store_command.gc(1, dry_run=True, yes=False, as_json=True)
    planned = json.loads(capsys.readouterr().out)
    assert (planned["dry_run"], planned["bytes"]) == (True, size)
    assert [row["path"] for row in planned["removed"]] == [str(other.path)]
    assert other.path.exists()
    store_command.gc(1, dry_run=False, yes=True, as_json=False)
    assert f"1 folders, {quantity.size(size)} ({size} bytes): removed." in capsys.readouterr().out
    assert {a.path for a in store.artifacts()} == {prepare.path, parent.path, child.path}
    assert not list(store.root.glob("artifacts/*/.*"))


@pytest.mark.parametrize("keep", [0, 1])
def test_gc_frees_unfinished_work_that_nobody_goes_on_with_or_works_on(
    keep: int, store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept: the checkpoints of the newest unfinished run (with keep 1), and all under a lease; the rest goes."""
    runs = Runs(store.root)
    nodes = {"pretrain": NodeRecord(stage="pretrain", fingerprint="f" * 64, resume_key="a" * 64)}
    record = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=nodes)
    runs.finish(record, "failed", 4)
    for key in ("a", "b", "c"):
        folder = store.scratch("pretrain", key * 64)
        folder.mkdir(parents=True)
        (folder / "checkpoint").write_bytes(b"0" * 100)
        (store.build_folder("pretrain", key * 64) / "half").write_bytes(b"0" * 10)
    retired = store.path("pretrain", "r" * 64).with_name(".retired-x-1")
    retired.mkdir()
    (retired / "old").write_bytes(b"0")
    with store.lease("pretrain", "c" * 64, wait_s=0):
        for dry_run in (True, False):
            store_command.gc(keep, dry_run=dry_run, yes=True, as_json=True)
            said = json.loads(capsys.readouterr().out)
            assert said["bytes"] == (100 if keep else 200) + 20 + 1
            assert sorted({row["kind"] for row in said["removed"]}) == ["building", "retired", "scratch"]
    left = {path.name for path in (store.root / "scratch").iterdir()}
    assert left == {"pretrain-" + key * 32 for key in (("a", "c") if keep else ("c",))}
    assert [path.name for path in (store.root / "artifacts" / "pretrain").iterdir()] == [".building-" + "c" * 32]


def test_gc_never_removes_what_a_run_at_work_or_a_leased_stage_needs(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with --keep 0: the run's nodes with their ancestors, its checkpoints, and the inputs of a lone stage."""
    prepare = made("prepare")
    parent, lone, garbage = (made("pretrain", prepare, content=text) for text in ("one", "two", "three"))
    key = {"stage": "pretrain", "fingerprint": parent.manifest.fingerprint, "resume_key": "a" * 64}
    nodes = {"pretrain": NodeRecord.model_validate(key)}
    record = Runs(store.root).start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=nodes)
    store.scratch("pretrain", "a" * 64).mkdir(parents=True)
    with store.lease("compress", "e" * 64, wait_s=0, inputs=[lone.manifest.fingerprint]):
        store_command.gc(0, dry_run=False, yes=True, as_json=True)
        assert [row["path"] for row in json.loads(capsys.readouterr().out)["removed"]] == [str(garbage.path)]
    Runs(store.root).finish(record, "done", 0)
    store_command.gc(0, dry_run=False, yes=True, as_json=True)
    capsys.readouterr()
    assert list(store.artifacts()) == []
    assert list((store.root / "scratch").iterdir()) == []


def test_a_run_does_not_begin_while_garbage_is_collected(store: LocalStore) -> None:
    began = threading.Event()

    def begin() -> None:
        Runs(store.root).start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
        began.set()

    with store.registering():
        thread = threading.Thread(target=begin)
        thread.start()
        assert not began.wait(0.5)
        assert Runs(store.root).all() == []
    thread.join()
    assert began.is_set()


def test_gc_works_on_a_full_disk(
    disk_of: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = disk_of(1024)
    store = LocalStore(disk.path / "store")
    monkeypatch.setenv("INGOT_STORE", str(store.root))
    with store.lease("pretrain", "a" * 64, wait_s=0, inputs=["b" * 64]):
        store.scratch("pretrain", "a" * 64).mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"):
        (store.scratch("pretrain", "a" * 64) / "checkpoint").write_bytes(b"0" * 2**21)
    store_command.gc(0, dry_run=False, yes=True, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in said["removed"]] == ["scratch"]
    assert said["bytes"] > 900_000
    assert not list((store.root / "scratch").iterdir())


def test_a_full_disk_is_told_what_gc_would_free(store: LocalStore, made: Made) -> None:
    size = sum(path.stat().st_size for path in made("prepare", content="x" * 5000).path.iterdir())
    assert store_command.reclaimable(3) == f"`ingot gc` would free {quantity.size(size)} at this moment"
    store_command.gc(3, dry_run=False, yes=True, as_json=True)
    assert store_command.reclaimable(3) == "`ingot gc` would free nothing at this moment"


def test_gc_keeps_a_registered_model_with_all_it_came_from_whatever_the_runs(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = made("prepare")
    champion, refused = made("pretrain", prepare), made("pretrain", prepare, content="other")
    records = store.root / history.HISTORY
    records.parent.mkdir()
    for action, model in (("promoted", champion), (history.REFUSED, refused)):
        record = {"model": "m", "action": action, "version": "1", "fingerprint": model.manifest.fingerprint}
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
    store_command.gc(0, dry_run=False, yes=True, as_json=True)
    assert [row["path"] for row in json.loads(capsys.readouterr().out)["removed"]] == [str(refused.path)]
    assert {a.path for a in store.artifacts()} == {prepare.path, champion.path}


def test_gc_never_counts_runs_that_left_nothing_and_keeps_what_champion_and_decision_need(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good run, then refused and failed ones: the good run stays; of an older one, only what the champion needs."""
    prepare = made("prepare")
    champion = made("pretrain", prepare)
    evaluation = made("evaluate.pretrain", prepare, model=champion)
    sibling = made("compress.v", champion)
    decision = made("promote", summary={"candidate": "pretrain"}, **{"model:pretrain": champion, "model:v": sibling})
    stranger = made("evaluate.v", prepare, model=sibling)
    history.append(store.root, "m", history.PROMOTE, version="1", why="", fingerprint=champion.manifest.fingerprint)
    remember(store, prepare, champion, evaluation, sibling, stranger, decision)
    good = [made("pretrain", prepare, content="good")]
    remember(store, prepare, *good)
    runs = Runs(store.root)
    for status in ("refused", "failed", "preempted"):
        nodes = {"pretrain": NodeRecord(stage="pretrain", fingerprint=status, resume_key=status)}
        runs.finish(runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes=nodes), status, 4)
    store_command.gc(1, dry_run=False, yes=True, as_json=True)
    assert {row["path"] for row in json.loads(capsys.readouterr().out)["removed"]} == {
        str(sibling.path), str(stranger.path)
    }  # fmt: skip
    for kept in (prepare, champion, evaluation, decision, *good):
        kept.verify()


def test_gc_keeps_what_an_unfinished_run_goes_on_from_beside_the_newest_finished_ones(
    store: LocalStore, made: Made
) -> None:
    finished = made("pretrain")
    remember(store, finished)
    runs = Runs(store.root)
    half = made("prepare")
    nodes = {
        "prepare": NodeRecord(stage="prepare", fingerprint=half.manifest.fingerprint, state="done"),
        "pretrain": NodeRecord(stage="pretrain", fingerprint="f" * 64, resume_key="a" * 64),
    }
    runs.finish(runs.start(recipe="x", overrides=[], config={}, data_hash="d", nodes=nodes), "preempted", 75)
    store.scratch("pretrain", "a" * 64).mkdir(parents=True)
    store_command.gc(1, dry_run=False, yes=True, as_json=True)
    assert {a.path for a in store.artifacts()} == {finished.path, half.path}
    assert store.scratch("pretrain", "a" * 64).is_dir()


def test_gc_asks_at_a_terminal_and_refuses_where_there_is_none(
    store: LocalStore, made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage = made("prepare", content="x" * 2000)
    size = quantity.size(disk.size_of(garbage.path))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ConfigError, match="there is no terminal to ask at"):
        store_command.gc(3, dry_run=False, yes=False, as_json=False)
    leader, follower = pty.openpty()
    with os.fdopen(leader, "wb", buffering=0) as keyboard, os.fdopen(follower) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        for answer, left in ((b"\n", True), (b"n\n", True), (b"y\n", False)):
            keyboard.write(answer)
            store_command.gc(3, dry_run=False, yes=False, as_json=False)
            assert garbage.path.exists() == left
    said = capsys.readouterr().out
    assert said.count("Nothing was removed.") == 2
    (line,) = {line for line in said.splitlines() if line.strip().startswith("prepared data")}
    assert line.split()[2:] == [*size.split(), "0", "B"]
    assert f"Remove 1 folders, {size}?" in said


def test_a_download_at_work_is_no_garbage(store: LocalStore) -> None:
    young, old = store.root / "scratch" / "fetched-a", store.root / "scratch" / "fetched-b"
    for folder in (young, old):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    store_command.gc(0, dry_run=False, yes=True, as_json=True)
    assert (young.exists(), old.exists()) == (True, False)


def test_a_run_is_deleted_with_its_report_unless_it_is_at_work_or_the_record_of_a_champion(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    champion, other = made("pretrain"), made("pretrain", content="other")
    history.append(store.root, "m", history.PROMOTE, version="1", why="", fingerprint=champion.manifest.fingerprint)
    of_champion, of_other = remember(store, champion), remember(store, other)
    runs = Runs(store.root)
    (runs.folder(of_other) / "report.html").write_text("x")
    store_command.delete(of_other, as_json=True)
    assert json.loads(capsys.readouterr().out)["run"] == of_other
    assert [run.id for run in runs.all()] == [of_champion]
    assert not runs.folder(of_other).exists()
    other.verify()  # `ingot gc` is for artifacts
    with pytest.raises(ConfigError, match=f"{of_champion} is the only record of how m/1 was made"):
        store_command.delete(of_champion, as_json=True)
    second = remember(store, champion)
    store_command.delete(of_champion, as_json=True)
    assert [run.id for run in runs.all()] == [second]
    at_work = runs.start(recipe="smoke", overrides=[], config={}, data_hash="d", nodes={})
    with pytest.raises(ConfigError, match="is at work"):
        store_command.delete(at_work.id, as_json=True)
    runs.finish(at_work, "done", 0)
    (runs.folder(at_work.id) / "run.json").write_text("{")
    store_command.delete(at_work.id, as_json=True)
    assert [run.id for run in runs.all()] == [second]


def test_gc_of_an_empty_store_removes_nothing(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    store_command.gc(3, dry_run=False, yes=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"dry_run": False, "bytes": 0, "removed": [], "kinds": []}
    assert not store.root.exists()


def test_verify_names_every_damaged_file_and_every_damaged_manifest(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, flipped, torn = made("prepare"), made("pretrain"), made("evaluate.pretrain")
    (flipped.path / "out.txt").write_text("y")
    (torn.path / artifact.MANIFEST).write_text("{")
    with pytest.raises(IntegrityError) as caught:
        store_command.verify(None, as_json=True)
    assert f"{flipped.path / 'out.txt'} does not match its manifest" in str(caught.value)
    assert f"{torn.path / artifact.MANIFEST} is damaged" in str(caught.value)
    assert {row["node"]: row["state"] for row in printed(capsys)} == {"prepare": "ok", "pretrain": "damaged"}
    store_command.verify(sound.manifest.fingerprint[:8], as_json=True)
    assert [row["state"] for row in printed(capsys)] == ["ok"]


def test_verify_of_a_run_looks_at_its_artifacts_only(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = made("prepare"), made("pretrain")
    (other.path / "out.txt").write_text("y")
    store_command.verify(remember(store, mine), as_json=True)
    assert [row["node"] for row in printed(capsys)] == ["prepare"]


def test_show_reads_each_manifest_a_few_times_however_many_ancestors_there_are(
    store: LocalStore, made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = made("prepare")
    for number in range(8):
        newest = made(f"compress.{number}", newest)
    loaded: list[Path] = []
    load = artifact.load
    monkeypatch.setattr(artifact, "load", lambda path: loaded.append(path) or load(path))
    show_command.show(str(newest.path), None, [], as_json=False)
    assert capsys.readouterr().out.count("compress.") > 7
    assert len(loaded) <= 10  # the artifact itself, then each of nine once


def test_a_model_is_exported_only_where_there_is_one(store: LocalStore, made: Made, tmp_path: Path) -> None:
    prepare = made("prepare")
    with pytest.raises(ConfigError, match="/prepare' is no model"):
        store_command.export(
            remember(store, prepare) + "/prepare", str(tmp_path / "out"), "hf", None, weights_only=False
        )
    with pytest.raises(ConfigError, match="there is no registered model yet"):
        store_command.export("champion", str(tmp_path / "out"), "hf", None, weights_only=False)
    assert not (tmp_path / "out").exists()


def test_lists_show_what_there_is_and_an_unknown_one_offers_the_nearest(
    store: LocalStore, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    found = made("prepare", content="four")
    run = remember(store, found)
    list_command.show("artifacts", as_json=True)
    (row,) = printed(capsys)
    assert (row["node"], row["bytes"], row["digest"], row["path"]) == ("prepare", 4, found.digest, str(found.path))
    list_command.show("runs", as_json=True)
    assert [(row["id"], row["status"]) for row in printed(capsys)] == [(run, "done")]
    list_command.show("optimizers", as_json=True)
    assert {row["name"] for row in printed(capsys)} == {"lamb", "lars", "adamw"}
    with pytest.raises(ConfigError, match=r"there is no list of 'artefacts'; did you mean 'artifacts'\?"):
        list_command.show("artefacts", as_json=True)
