"""Estimates along the graph: what a stage tells those below it, and what earlier artifacts tell a new plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import planner, recipe
from flows.graph import Identified, identify
from flows.planner import Step
from pipelines.core import artifact
from pipelines.core.provenance import capture
from pipelines.core.store import LocalStore

DATA = "0123abcd" * 4
COUNTED: dict[str, Any] = {
    "vocab_size": 4096,
    "sequence_length": 256,
    **{f"{name}_tokens": tokens for name, tokens in (("train", 4_000_000), ("validation", 160_000), ("test", 164_000))},
    **{f"{name}_bytes": size for name, size in (("train", 12_700_000), ("validation", 490_000), ("test", 507_000))},
    "test_documents": 120,
}
SUMMARIES: dict[str, dict[str, Any]] = {
    "prepare": COUNTED,
    "pretrain": {"parameters": 4_262_144},
    "evaluate": {"documents": 120},
    "compress": {"parameters": {"bits": 8}},
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store."""
    return LocalStore(tmp_path / "store")


def graph_of(*overrides: str, name: str = "demo") -> dict[str, Identified]:
    """The graph of a recipe with overrides."""
    return identify(recipe.resolve(name, list(overrides)), DATA)


def publish(store: LocalStore, graph: dict[str, Identified], took_s: float = 100.0) -> None:
    """Publish what a finished run leaves, as far as estimates read it."""
    for name, node in graph.items():
        stage = node.node.stage
        artifact.publish(
            store.build_folder(stage.name, node.fingerprint),
            store.path(stage.name, node.fingerprint),
            stage=stage.name,
            node=name,
            identity=node.identity,
            parents={},
            summary=SUMMARIES.get(stage.name, {}),
            provenance=capture(duration_s=took_s, source_digest="", data_hash=DATA),
        )


def plan(
    store: LocalStore, *overrides: str, name: str = "demo", corpus_bytes: int | None = 3_768_778
) -> dict[str, Step]:
    """The plan by node."""
    steps = planner.make(graph_of(*overrides, name=name), store, corpus_bytes=corpus_bytes)
    return {step.node: step for step in steps}


def test_tokens_of_the_bundled_corpus_are_told_from_its_size_before_anything_ran(store: LocalStore) -> None:
    facts = plan(store)["prepare"].estimate.facts
    assert facts["train_tokens"] == pytest.approx(4_025_600, rel=0.1)  # as a run has counted them
    assert facts["test_tokens"] == pytest.approx(164_096, rel=0.1)
    assert plan(store)["prepare"].estimate.disk["tokens"] == pytest.approx(8_709_504, rel=0.1)


def test_a_run_over_the_same_corpus_has_counted_its_text(store: LocalStore) -> None:
    publish(store, graph_of())
    again = plan(store, "prepare.vocab_size=8192", corpus_bytes=None)["prepare"]
    assert again.estimate.facts["train_tokens"] < 4_000_000
    assert again.estimate.time is not None
    assert again.estimate.time.source == "measured"


def test_more_than_65536_tokens_take_four_bytes_each(store: LocalStore) -> None:
    small, large = (plan(store, f"prepare.vocab_size={size}")["prepare"].estimate for size in (65_536, 65_537))
    assert large.disk["tokens"] == pytest.approx(2 * small.disk["tokens"], rel=0.01)


def test_a_larger_model_is_told_to_the_stages_below_it(store: LocalStore) -> None:
    small, large = plan(store), plan(store, "pretrain.preset=30m")
    for node in ("evaluate.pretrain", "compress.rtn-int8-channel", "evaluate.rtn-int8-channel"):
        for of in (lambda step: step.estimate.memory_bytes, lambda step: step.seconds):
            assert of(large[node]) > of(small[node]), node
    assert (
        large["compress.rtn-int8-channel"].estimate.facts["parameters"]
        == large["pretrain"].estimate.facts["parameters"]
    )


def test_fewer_bits_take_less_disk(store: LocalStore) -> None:
    steps = plan(store)
    eight, four = (steps[f"compress.rtn-{name}"].estimate.disk_bytes for name in ("int8-channel", "int4-g64"))
    assert eight == pytest.approx(7.7e6, rel=0.1)  # docs/results/demo.md
    assert four == pytest.approx(6.2e6, rel=0.1)


def test_an_evaluation_of_another_model_is_scaled_by_what_both_score(store: LocalStore) -> None:
    publish(store, graph_of())
    same, larger = plan(store, "pretrain.seed=5"), plan(store, "pretrain.preset=30m")
    for steps, source in ((same, "measured"), (larger, "scaled")):
        time = steps["evaluate.pretrain"].estimate.time
        assert time is not None
        assert time.source == source
    fewer = plan(store, "pretrain.preset=30m", "evaluate.max_documents=12")["evaluate.pretrain"]
    assert same["evaluate.pretrain"].seconds == 100.0
    assert (fewer.seconds or 0) < (larger["evaluate.pretrain"].seconds or 0)


def test_a_variant_is_timed_by_its_own_method_only(store: LocalStore) -> None:
    publish(store, graph_of())
    steps = plan(store, "compress.1.method=gptq", "compress.1.bits=3")
    time = steps["compress.gptq-int3-g64"].estimate.time
    assert time is not None
    assert (time.source, time.basis.split()[0]) == ("measured", "compress.gptq-int4-g64")


def test_another_method_tells_nothing_of_the_time_of_this_one(store: LocalStore) -> None:
    publish(store, graph_of(name="smoke"))  # it has rtn alone
    times = [plan(store)[f"compress.{name}"].estimate.time for name in ("rtn-int4-g64", "gptq-int4-g64")]
    assert [time and time.source for time in times] == ["measured", "stated"]


def test_a_method_that_trains_holds_masters_and_moments_on_its_ranks(store: LocalStore) -> None:
    steps = plan(store, name="demo-qat")
    trained = steps["compress.distilled"].estimate
    assert trained.ranks == 2
    assert trained.memory["training"] > steps["pretrain"].estimate.facts["parameters"] * 4
    assert "training" not in steps["compress.pruned"].estimate.memory


@pytest.mark.parametrize("name", recipe.names())
def test_every_stage_with_an_estimator_is_estimated_in_every_recipe(name: str, store: LocalStore) -> None:
    for step in plan(store, name=name).values():
        if step.stage != "promote":
            assert step.estimate.memory_bytes, step.node
            assert step.estimate.disk_bytes, step.node
            assert step.seconds, step.node
