"""`ingot show RUN`: the stages, then the run's variants by size with their baselines."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import list as list_command
from flows.commands import lookup, show
from flows.run_record import PARETO, NodeRecord, RunRecord, Runs
from pipelines.core import artifact, fingerprint
from pipelines.core.artifact import write_text
from pipelines.core.errors import ConfigError, IngotError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.core.store import LocalStore
from pipelines.registry import history


def variant(name: str, **changes: Any) -> dict[str, Any]:
    """A row as the report leaves it."""
    row = {
        "model": name,
        "method": "gptq",
        "bits_per_weight": 4.25,
        "bits_per_cached_number": None,
        "size_bytes": 2_000_000,
        "footprint_bytes": 2_000_000.0,
        "cache_tokens": 0,
        "ratio": 1.002,
        "ratio_low": 1.001,
        "ratio_high": 1.003,
        "best": True,
        "baselines": {
            "rtn": {"ratio": {"value": 1.011}},
            "zeros": {"ratio": {"value": 1.5}},
        },
    }
    return row | changes


QUANTIZED = variant(
    "coded",
    method="kvquant",
    bits_per_weight=None,
    bits_per_cached_number=3.402,
    footprint_bytes=2_500_000.0,
    cache_tokens=4096,
    best=False,
    baselines={},
)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunRecord]:
    """Return a function that makes a finished run with these variants."""
    monkeypatch.setattr(lookup, "store", lambda: LocalStore(tmp_path))
    monkeypatch.setattr(show, "store", lambda: LocalStore(tmp_path))

    def make(*variants: dict[str, Any]) -> RunRecord:
        runs = Runs(tmp_path)
        nodes = {"pretrain": NodeRecord(stage="pretrain", fingerprint="0" * 64)}
        record = runs.start(recipe="mine", overrides=[], config={}, data_hash="d", nodes=nodes)
        if variants:
            (runs.folder(record.id) / PARETO).write_text(json.dumps(variants))
        runs.finish(record, "done", 0)
        return record

    return make


def shown(record: RunRecord, capsys: pytest.CaptureFixture[str], *, as_json: bool = False) -> str:
    show.show(record.id, None, [], as_json=as_json)
    return capsys.readouterr().out


def test_a_variant_is_a_line_with_its_size_its_ratio_and_its_baselines_best_first(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(finished(variant("int4")), capsys)
    assert "pretrain" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("int4")]
    # The variant is no baseline of its own.
    assert " ".join(line.split()) == "int4 gptq 4.25 2 MB 1.00200 [1.00100, 1.00300] best rtn 1.01100, zeros 1.50000"
    assert "with a cache of" not in text


def test_a_quantized_cache_is_counted_and_said_to_be(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(finished(QUANTIZED), capsys)
    assert "Sizes are with a cache of 4,096 tokens." in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("coded")]
    assert " ".join(line.split()) == "coded kvquant 3.4 cached 2.5 MB 1.00200 [1.00100, 1.00300]"


def test_a_variant_without_numbers_and_a_run_without_variants_are_shown(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = variant("lost", ratio=None, ratio_low=None, ratio_high=None, bits_per_weight=None, best=False, baselines={})
    (line,) = [line for line in shown(finished(lost), capsys).splitlines() if line.strip().startswith("lost")]
    assert line.split() == ["lost", "gptq", "-", "2", "MB", "-", "-"]
    assert "Variants by size" not in shown(finished(), capsys)


def test_json_has_the_record_and_every_row(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    record = finished(variant("int4"), QUANTIZED)
    facts = json.loads(shown(record, capsys, as_json=True))
    assert (facts["id"], facts["status"]) == (record.id, "done")
    assert [row["model"] for row in facts["pareto"]] == ["int4", "coded"]
    assert facts["pareto"][0] == variant("int4")
    assert json.loads(shown(finished(), capsys, as_json=True))["pareto"] == []


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs of the store that the commands use."""
    monkeypatch.setenv("INGOT_STORE", str(tmp_path))
    return Runs(tmp_path)


def evaluated(runs: Runs, *, config: dict[str, Any], **summaries: dict[str, Any]) -> RunRecord:
    """A finished run whose nodes have these summaries."""
    nodes = {
        name: NodeRecord(stage=name.partition(".")[0], fingerprint="0" * 64, summary=summary)
        for name, summary in summaries.items()
    }
    record = runs.start(recipe="mine", overrides=[], config=config, data_hash="d", nodes=nodes)
    runs.finish(record, "done", 0)
    return record


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_difference_shows_the_digits_that_differ_headline_numbers_first_and_no_equal_rows(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"bits_per_byte": 2.0130001, "low": 1.0, "size_bytes": 1, "documents": 7}
    new = {"bits_per_byte": 2.0130002, "low": 1, "size_bytes": 2, "documents": 7}
    first = evaluated(runs, config={"a": 1, "b": "x"}, evaluate=old, compress={"method": "rtn"})
    second = evaluated(runs, config={"a": 1.0, "b": "y"}, evaluate=new, compress={})
    show.diff(first.id, second.id, as_json=False)
    assert lines(capsys) == [
        ["field", "old", "new"],
        ["results.evaluate.bits_per_byte", "2.0130001", "2.0130002"],
        ["config.b", "x", "y"],
        ["results.evaluate.size_bytes", "1", "2"],
        ["results.compress", "method", "rtn", "-"],
    ]
    show.diff(first.id, first.id, as_json=False)
    assert capsys.readouterr().out == "no difference\n"


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        (0.1, 0.1 + 1e-17 + 2e-17, ("0.1", "0.10000000000000003")),
        (1234567, 1234568, ("1234567", "1234568")),
        (2.5, 3.0, ("2.5", "3")),
        (True, 1, ("true", "1")),
        ("1", 1, ("'1'", "1")),
        (None, 0.123456789, ("null", "0.123457")),
    ],
)
def test_two_different_values_never_read_the_same(old: Any, new: Any, texts: tuple[str, str]) -> None:
    assert show._told_apart(old, new) == texts


@pytest.mark.timeout(60)
def test_a_run_is_followed_to_its_end_and_its_exit_code_is_that_of_the_command(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {name: NodeRecord(stage=name, fingerprint="0" * 64) for name in ("prepare", "pretrain")}
    nodes["prepare"].state = "cached"
    record = runs.start(recipe="mine", overrides=[], config={}, data_hash="d", nodes=nodes)
    said: list[str] = []

    def say(line: str) -> None:
        """While the follower tells what it read, more is written; it has to read that too."""
        said.append(line)
        if line.split() == ["prepare", "cached"]:
            nodes["pretrain"].state = "done"
            nodes["pretrain"].summary = {"train_tokens": 12}
            runs.save(record)
        else:
            runs.finish(record, "refused", 7, "too large")

    monkeypatch.setattr(show.console, "say", say)
    assert show.status(None, follow=True, as_json=False) == 7
    assert [line.split() for line in said] == [["prepare", "cached"], ["pretrain", "done", "train_tokens", "12"]]
    assert "mine" in capsys.readouterr().out


def test_following_ends_when_the_run_is_killed(runs: Runs) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.run_record import Runs\n"
        "Runs(Path(sys.argv[1])).start(recipe='smoke', overrides=[], config={}, data_hash='d', nodes={})\n"
        "print('started', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(runs.root.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        codes: list[int] = []
        follower = threading.Thread(target=lambda: codes.append(show.status(None, follow=True, as_json=True)))
        follower.start()
        process.kill()
    follower.join(timeout=30)
    assert codes == [1]
    assert runs.get().state == "killed"


def test_ctrl_c_stops_looking_and_leaves_the_run_at_work(runs: Runs) -> None:
    nodes = {"pretrain": NodeRecord(stage="pretrain", fingerprint="0" * 64, state="running", done=1, total=9)}
    record = runs.start(recipe="mine", overrides=[], config={}, data_hash="d", nodes=nodes)
    with subprocess.Popen(
        [sys.executable, "-m", "flows", "status", "--follow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT,
        env={**os.environ, "INGOT_STORE": str(runs.root.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as looker:  # fmt: skip
        try:
            assert looker.stderr is not None
            assert looker.stderr.readline().split()[:2] == ["pretrain", "1/9"]
            looker.send_signal(signal.SIGINT)
            assert (looker.wait(timeout=30), *looker.communicate()) == (130, "", "")
        finally:
            looker.kill()
    assert runs.get().at_work
    runs.finish(record, "done", 0)


def _turned_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _edited(**changes: Any) -> Callable[[Path], None]:
    return lambda path: write_text(path, json.dumps(json.loads(path.read_text()) | changes))


def _holding(text: str) -> Callable[[Path], None]:
    return lambda path: write_text(path, text)


DAMAGES = [
    *(("runs/*/run.json", damage) for damage in (_holding("{"), _holding("[]"), _edited(started_at="yesterday"))),
    *(("runs/*/pareto.json", _holding(text)) for text in ("", "{", "[3]", '[{"model": "a"}]')),
    *(("artifacts/*/*/manifest.json", damage) for damage in (_holding("[]"), Path.unlink, _turned_into_a_folder)),
    *(
        ("registry/history.jsonl", _holding(json.dumps({"action": "promote", **record}) + "\n"))
        for record in ({"model": 3, "version": 4}, {"model": "m", "version": "1", "tracking_uri": "nowhere"})
    ),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_what_is_damaged_is_left_out_or_named_and_never_a_traceback(
    pattern: str, damage: Callable[[Path], None], finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(list_command, "store", lambda: LocalStore(tmp_path))
    record = finished(variant("int4"))
    store, identity = LocalStore(tmp_path), {"node": "prepare", "inputs": {}}
    build, final = store.build_folder("prepare", "prepare"), store.path("prepare", fingerprint.digest(identity))
    made = artifact.publish(build, final, stage="prepare", node="prepare", identity=identity, parents={}, summary={})
    history.append(tmp_path, "m", history.PROMOTE, version="1", why="a test")
    (damaged,) = tmp_path.glob(pattern)
    damage(damaged)
    looks = [functools.partial(list_command.show, what, as_json=False) for what in ("runs", "artifacts", "models")]
    looks += [functools.partial(list_command.show, "champions", as_json=False)]
    for target in (record.id, made.manifest.fingerprint[:8], "champion"):
        looks.append(functools.partial(show.show, target, None, [], as_json=False))
    for look in looks:
        with contextlib.suppress(IngotError):  # a message; anything else is a traceback and fails the test
            look()


def test_runs_are_listed_newest_first_with_their_result_and_their_time(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    validated = evaluated(runs, config={}, pretrain={"bits_per_byte": 2.5})  # as older versions called it
    judged = evaluated(runs, config={}, pretrain={}, **{"evaluate.pretrain": {"bits_per_byte": 2.25}})
    promoted = evaluated(runs, config={}, promote={"bits_per_byte": 2.2, "candidate": "int8"})
    promoted.started_at, promoted.finished_at = "2026-01-01T00:00:00+00:00", "2026-01-01T01:00:00+00:00"
    runs.save(promoted)
    list_command.show("runs", as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["result"]) for row in rows] == [
        (promoted.id, "2.2 bits/byte (int8)"),
        (judged.id, "2.25 bits/byte (pretrain)"),
        (validated.id, "2.5 validation bits/byte"),
    ]
    assert (rows[0]["seconds"], rows[0]["took"]) == (3600, "1 h 0 min")


def test_a_number_that_was_not_measured_on_the_whole_test_split_is_marked_wherever_it_stands(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    summaries = {"evaluate.pretrain": {"bits_per_byte": 2.5, "truncated": True}}
    judged = evaluated(runs, config={}, **summaries)
    summaries |= {"evaluate.int8": {"bits_per_byte": 2.2, "truncated": True}}
    promoted = evaluated(runs, config={}, **summaries, promote={"bits_per_byte": 2.2, "candidate": "int8"})
    assert [judged.result, promoted.result] == [
        "2.5 bits/byte (pretrain, truncated)",
        "2.2 bits/byte (int8, truncated)",
    ]
    show.status(promoted.id, follow=False, as_json=False)
    marked = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "truncated, bits_per_byte" in line]
    assert marked == ["evaluate.pretrain", "evaluate.int8"]


@pytest.mark.parametrize(
    ("target", "recipe_name", "overrides", "as_toml"),
    [("champion", "demo", [], False), ("schema", None, ["pretrain.steps=3"], False), ("config", None, [], True)],
)
def test_an_option_that_would_change_nothing_of_what_is_shown_is_refused(
    target: str, recipe_name: str | None, overrides: list[str], as_toml: bool
) -> None:
    with pytest.raises(ConfigError):
        show.show(target, recipe_name, overrides, as_json=True, as_toml=as_toml)


def test_a_prepared_corpus_says_what_it_lost_by_bytes_with_a_sample_of_each_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, identity = LocalStore(tmp_path), {"node": "prepare", "inputs": {}}
    build, final = store.build_folder("prepare", "prepare"), store.path("prepare", fingerprint.digest(identity))
    web = {"read": 9, "read_bytes": 1000, "dropped": {"symbols": 2}, "dropped_bytes": {"symbols": 300}}
    cut = {"cut": {"contaminated": 1}, "cut_bytes": {"contaminated": 50}}
    samples = {reason: [{"id": f"d-{reason}", "source": "web", "text": "=-=\n=-="}] for reason in ("symbols",)}
    (build / "report.json").write_text(
        json.dumps({"sources": {"web": web | cut}, "samples": samples}), encoding="utf-8"
    )
    counts = {"train_bytes": 600, "train_tokens": 200}
    made = artifact.publish(
        build, final, stage="prepare", node="prepare", identity=identity, parents={}, summary=counts
    )
    monkeypatch.setattr(show, "store", lambda: LocalStore(tmp_path))
    show._show_artifact(made, as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["web", "symbols", "2", "0", "300", "30.00%", "100"] in lines
    assert ["web", "contaminated", "0", "1", "50", "5.00%", "17"] in lines
    assert ["symbols,", "as", "d-symbols:", "=-=", "=-="] in lines
