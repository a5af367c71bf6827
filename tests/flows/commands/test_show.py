"""`ingot show RUN`: the stages, then the run's children by size with their arms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import lookup, show
from flows.run_record import PARETO, NodeRecord, RunRecord, Runs
from pipelines.core.store import Store


def child(name: str, **changes: Any) -> dict[str, Any]:
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


CODED = child(
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
    """Return a function that makes a finished run with these children."""
    monkeypatch.setattr(lookup, "store", lambda: Store(tmp_path))
    monkeypatch.setattr(show, "store", lambda: Store(tmp_path))

    def make(*children: dict[str, Any]) -> RunRecord:
        runs = Runs(tmp_path)
        nodes = {"pretrain": NodeRecord(stage="pretrain", fingerprint="0" * 64)}
        record = runs.start(recipe="mine", overrides=[], config={}, data_hash="d", nodes=nodes)
        if children:
            (runs.folder(record.id) / PARETO).write_text(json.dumps(children))
        runs.finish(record, "done", 0)
        return record

    return make


def shown(record: RunRecord, capsys: pytest.CaptureFixture[str], *, as_json: bool = False) -> str:
    show.show(record.id, "demo", [], as_json=as_json)
    return capsys.readouterr().out


def test_a_child_is_a_line_with_its_size_its_ratio_and_its_arms_best_first(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(finished(child("int4")), capsys)
    assert "pretrain" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("int4")]
    # The child is no arm of its own.
    assert " ".join(line.split()) == "int4 gptq 4.25 2.0 MB 1.00200 [1.00100, 1.00300] best rtn 1.01100, zeros 1.50000"
    assert "with a cache of" not in text


def test_a_coded_cache_is_counted_and_said_to_be(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(finished(CODED), capsys)
    assert "Sizes are with a cache of 4,096 tokens." in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("coded")]
    assert " ".join(line.split()) == "coded kvquant 3.4 cached 2.5 MB 1.00200 [1.00100, 1.00300]"


def test_a_child_without_numbers_and_a_run_without_children_are_shown(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = child("lost", ratio=None, ratio_low=None, ratio_high=None, bits_per_weight=None, best=False, baselines={})
    (line,) = [line for line in shown(finished(lost), capsys).splitlines() if line.strip().startswith("lost")]
    assert line.split() == ["lost", "gptq", "-", "2.0", "MB", "-", "-"]
    assert "Children by size" not in shown(finished(), capsys)


def test_json_has_the_record_and_every_row(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    record = finished(child("int4"), CODED)
    facts = json.loads(shown(record, capsys, as_json=True))
    assert (facts["id"], facts["status"]) == (record.id, "done")
    assert [row["model"] for row in facts["pareto"]] == ["int4", "coded"]
    assert facts["pareto"][0] == child("int4")
    assert json.loads(shown(finished(), capsys, as_json=True))["pareto"] == []
