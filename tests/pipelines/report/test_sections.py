"""The facts under the page: counts add up, repeated steps count once, every setting is listed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.core.artifact import Artifact
from pipelines.report import charts, sections


def test_the_data_table_adds_up(artifacts: dict[str, Artifact]) -> None:
    facts = sections.data(artifacts["prepare"])
    assert facts is not None
    assert facts["reasons"] == ["near duplicate", "too short"]
    for row in [*facts["sources"], facts["total"]]:
        assert row["read"] == row["kept"] + sum(row["reasons"])
    assert [split["documents"] for split in facts["splits"]] == [30, 30, 30]


def test_lost_text_is_shown_by_source_and_reason_most_bytes_first(artifacts: dict[str, Artifact]) -> None:
    path = artifacts["prepare"].path / "report.json"
    report = json.loads(path.read_text())
    (name, source), *_ = report["sources"].items()
    source |= {"read_bytes": 4000, "dropped": {"too long": 2}, "dropped_bytes": {"too long": 1000}}
    source |= {"cut": {"held-out text": 3}, "cut_bytes": {"held-out text": 40}}
    path.write_text(json.dumps(report))
    facts = sections.data(artifacts["prepare"])
    assert facts is not None
    rows = [[row[key] for key in ("source", "reason", "dropped", "cut", "bytes", "share")] for row in facts["lost"]]
    assert rows == [[name, "too long", 2, 0, 1000, 0.25], [name, "held-out text", 0, 3, 40, 0.01]]


def test_the_data_table_shows_what_held_out_text_shares_with_the_training_text(artifacts: dict[str, Artifact]) -> None:
    facts = sections.data(artifacts["prepare"])
    assert facts is not None
    assert {split["name"]: split["shared"] for split in facts["splits"]} == {
        "train": None,
        "validation": None,
        "test": 0.0123456,
    }


def test_a_step_repeated_after_a_resume_counts_once_with_its_last_numbers(artifacts: dict[str, Artifact]) -> None:
    path = artifacts["pretrain"].path / "metrics.jsonl"
    path.write_text(path.read_text() + "\n" + json.dumps({"step": 3, "loss": 1.25}) + "\n")
    rows = sections.metrics(artifacts["pretrain"])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2]["loss"] == 1.25


def test_a_run_without_trust_ratios_has_no_such_picture(artifacts: dict[str, Artifact]) -> None:
    path = artifacts["pretrain"].path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"step": s, "loss": 2.0, "lr": 0.1}) for s in (1, 2)))
    facts = sections.training(artifacts["pretrain"])
    assert facts is not None
    assert facts["trust"] == facts["norm"] == ""
    assert "<polyline" in facts["loss"]
    assert "validation" not in facts["loss"]


def test_many_layer_groups_are_thinned_to_what_colours_can_tell_apart(artifacts: dict[str, Artifact]) -> None:
    path = artifacts["pretrain"].path / "metrics.jsonl"
    row = {"loss": 2.0, "trust/embedding": 0.5, **{f"trust/layer.{n}": 0.1 + n for n in range(30)}}
    path.write_text("\n".join(json.dumps({"step": s, **row}) for s in (1, 2)))
    facts = sections.training(artifacts["pretrain"])
    assert facts is not None
    assert facts["trust"].count("<polyline") == charts.COLOURS
    assert ">embedding<" in facts["trust"]
    assert ">layer.29<" in facts["trust"]


def test_a_loss_that_is_not_a_number_is_a_gap(artifacts: dict[str, Artifact]) -> None:
    path = artifacts["pretrain"].path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": NaN}\n{"step": 4, "loss": null}'
    )
    facts = sections.training(artifacts["pretrain"])
    assert facts is not None
    assert "nan" not in facts["loss"].lower()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": {"b": 1, "c": None}}, [("a.b", "1"), ("a.c", "null")]),
        ({"a": [0.9, 0.95]}, [("a", "[0.9, 0.95]")]),
        ({"a": [{"name": "x", "k": True}, {"k": "v"}]}, [("a[x].name", "x"), ("a[x].k", "true"), ("a[1].k", "v")]),
        ({"a": {}}, [("a", "{}")]),
        ({"api_token": "abc"}, [("api_token", "<hidden>")]),
    ],
)
def test_every_setting_is_listed_under_its_dotted_name(value: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    from pipelines.core.redaction import HIDDEN

    wanted = [(name, HIDDEN if text == "<hidden>" else text) for name, text in expected]
    assert list(sections.flatten(value)) == wanted


def test_the_base_stands_first_and_baselines_last(record: dict[str, Any], artifacts: dict[str, Artifact]) -> None:
    backwards = dict(reversed(artifacts.items()))
    facts = sections.page(record, backwards)["evaluation"]
    assert [(row["model"], row["kind"]) for row in facts["rows"]] == [
        ("pretrain", "base"),
        ("<b>int4", "variant"),
        ("gzip", "baseline"),
    ]


def test_bits_per_byte_of_validation_text_are_called_that(artifacts: dict[str, Artifact]) -> None:
    path = artifacts["pretrain"].path / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bits_per_byte": 2.5}))
    facts = (sections.training(artifacts["pretrain"]) or {})["facts"]
    assert facts["validation_bits_per_byte"] == 2.5
    assert "bits_per_byte" not in facts


def test_a_model_that_writes_nothing_but_line_ends_fills_no_screen(artifacts: dict[str, Artifact]) -> None:
    row = {"step": 20, "prompt": "Once", "text": "a\n\nb" + "\n \n" * 40 + "c"}
    (artifacts["pretrain"].path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    facts = sections.training(artifacts["pretrain"])
    assert facts is not None
    assert facts["samples"][0]["text"] == "a\n\nb\n\nc"
