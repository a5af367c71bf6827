"""Plans: identity known before anything runs, and the field that made a stage stale, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import planner, recipe
from flows.graph import Identified, identify
from flows.planner import Selection
from pipelines.core import artifact
from pipelines.core.errors import ConfigError
from pipelines.core.machine import Machine
from pipelines.core.provenance import capture
from pipelines.core.store import LocalStore

DATA = "0123abcd" * 4


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store."""
    return LocalStore(tmp_path / "store")


def graph_of(*overrides: str, data: str = DATA) -> dict[str, Identified]:
    """The graph of the demo recipe with overrides."""
    return identify(recipe.resolve("demo", list(overrides)), data)


def publish(
    store: LocalStore,
    graph: dict[str, Identified],
    *,
    only: str | None = None,
    content: str = "",
    summary: dict[str, Any] | None = None,
) -> None:
    """Publish an artifact for each node, as a finished run leaves them."""
    for name, node in graph.items():
        if only not in {None, name} or store.find(node.node.stage.name, node.fingerprint):
            continue
        build = store.build_folder(node.node.stage.name, node.fingerprint)
        (build / "payload.txt").write_text(name + content)
        parents = {}
        for key, source in node.node.inputs.items():
            used = store.find(graph[source].node.stage.name, graph[source].fingerprint)
            assert used is not None
            parents[key] = used.digest
        artifact.publish(
            build,
            store.path(node.node.stage.name, node.fingerprint),
            stage=node.node.stage.name,
            node=name,
            identity=node.identity,
            parents=parents,
            summary=summary or {},
            provenance=capture(duration_s=2.0, source_digest=node.node.stage.source_digest(), data_hash=DATA),
        )


def states(steps: list[planner.Step]) -> dict[str, str]:
    """Node -> state."""
    return {step.node: step.state for step in steps}


def why(steps: list[planner.Step], node: str) -> str:
    """The reason that a node gives."""
    return next(step.why for step in steps if step.node == node)


def test_an_empty_store_runs_prepare_and_everything_else_waits(store: LocalStore) -> None:
    found = states(planner.make(graph_of(), store))
    assert found["prepare"] == "run"
    assert set(found.values()) - {"run"} == {"waits"}


def test_planning_writes_nothing(store: LocalStore) -> None:
    planner.make(graph_of(), store)
    assert not store.root.exists()


def test_a_finished_run_is_cached_throughout(store: LocalStore) -> None:
    publish(store, graph_of())
    steps = planner.make(graph_of(), store)
    assert planner.is_done(steps)
    assert set(states(steps).values()) == {"cached"}


def test_one_changed_field_reruns_exactly_the_stages_below_it_and_is_named(store: LocalStore) -> None:
    publish(store, graph_of())
    steps = planner.make(graph_of("pretrain.seed=7"), store)
    assert states(steps)["prepare"] == "cached"
    assert {state for node, state in states(steps).items() if node != "prepare"} == {"run"}
    assert why(steps, "pretrain") == "pretrain.seed: 0 -> 7"
    assert why(steps, "evaluate.pretrain") == "input changed: pretrain"


def test_a_changed_child_leaves_its_siblings_alone(store: LocalStore) -> None:
    publish(store, graph_of())
    steps = planner.make(graph_of("compress.2.group_size=128"), store)
    run = {node for node, state in states(steps).items() if state == "run"}
    assert len(run) == 3
    assert "promote" in run
    changed = next(node for node in run if node.startswith("compress."))
    assert "compress.group_size: 64 -> 128" in why(steps, changed)


def test_a_changed_method_is_told_by_name(store: LocalStore) -> None:
    publish(store, graph_of())
    steps = planner.make(graph_of("compress.1.method=gptq", "compress.1.group_size=32"), store)
    changed = next(step for step in steps if step.stage == "compress" and step.state == "run")
    assert "group_size" in changed.why or "method" in changed.why


def test_the_last_run_of_the_same_recipe_is_compared_with_before_a_closer_one_of_another(store: LocalStore) -> None:
    mine, closer = graph_of("pretrain.seed=7", "pretrain.steps=900"), graph_of("pretrain.seed=8")
    publish(store, mine)
    publish(store, closer)
    wanted = graph_of("pretrain.seed=9")
    assert why(planner.make(wanted, store), "pretrain") == "pretrain.seed: 8 -> 9"
    last = {name: node.fingerprint for name, node in mine.items()}
    reason = why(planner.make(wanted, store, last=last), "pretrain")
    assert "pretrain.seed: 7 -> 9" in reason
    assert "pretrain.steps: 900 -> " in reason


def test_a_field_without_effect_on_results_changes_nothing(store: LocalStore) -> None:
    publish(store, graph_of())
    assert planner.is_done(planner.make(graph_of("compute.retries=7", "pretrain.log_every=5"), store))


def test_another_corpus_reruns_everything_and_is_named(store: LocalStore) -> None:
    publish(store, graph_of())
    steps = planner.make(graph_of(data="f" * 32), store)
    assert set(states(steps).values()) == {"run"}
    assert why(steps, "prepare") == f"data.dvc: {DATA[:8]} -> ffffffff"


def test_an_input_rebuilt_with_other_bytes_makes_its_readers_stale(store: LocalStore) -> None:
    graph = graph_of()
    publish(store, graph)
    node = graph["pretrain"]
    build = store.build_folder("pretrain", node.fingerprint)
    (build / "payload.txt").write_text("other bytes")
    artifact.publish(
        build, store.path("pretrain", node.fingerprint), stage="pretrain", node="pretrain",
        identity=node.identity, parents={}, summary={},
    )  # fmt: skip
    steps = planner.make(graph, store)
    assert why(steps, "evaluate.pretrain") == "input changed: pretrain was rebuilt with other bytes"


def test_force_from_and_only_select_what_they_name(store: LocalStore) -> None:
    publish(store, graph_of())
    graph = graph_of()
    forced = states(planner.make(graph, store, Selection(force=("evaluate",))))
    assert {n for n, s in forced.items() if s == "run"} == {n for n in graph if graph[n].node.stage.name == "evaluate"}
    since = states(planner.make(graph, store, Selection(since="pretrain")))
    assert {n for n, s in since.items() if s == "cached"} == {"prepare", "pretrain.adamw"}
    only = states(planner.make(graph, store, Selection(only="pretrain")))
    assert {n for n, s in only.items() if s == "skip"} == set(graph) - {"pretrain"}


def test_a_stage_that_does_not_exist_is_refused(store: LocalStore) -> None:
    with pytest.raises(ConfigError, match="'prtrain' is not a stage"):
        planner.make(graph_of(), store, Selection(only="prtrain"))


def test_a_changed_source_is_a_warning_not_a_rerun(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, graph_of())
    monkeypatch.setattr("pipelines.core.source_closure.digest", lambda _entry: "0" * 64)
    steps = planner.make(graph_of(), store)
    assert planner.is_done(steps)
    assert all("--force" in step.warning for step in steps)


def test_a_stage_without_an_estimator_takes_what_the_closest_earlier_one_took(store: LocalStore) -> None:
    publish(store, graph_of())
    (promote,) = (step for step in planner.make(graph_of("pretrain.seed=7"), store) if step.node == "promote")
    assert promote.seconds == 2.0
    assert promote.estimate.time is not None
    assert promote.estimate.time.source == "measured"


def test_every_stage_that_runs_is_estimated_and_one_that_is_done_takes_nothing(store: LocalStore) -> None:
    fresh = planner.make(graph_of(), store, corpus_bytes=3_000_000)
    known = {
        step.node for step in fresh if None not in (step.seconds, step.estimate.memory_bytes, step.estimate.disk_bytes)
    }
    assert {step.node for step in fresh} - known == {"promote"}
    publish(store, graph_of())
    assert {step.seconds for step in planner.make(graph_of(), store)} == {None}


MIXED = ('prepare.pack_by="source"', "pretrain.steps=100", "pretrain.phases=[]")


def test_a_plan_knows_what_a_mixture_takes_once_the_sources_are_counted(store: LocalStore) -> None:
    wanted = graph_of(*MIXED, 'pretrain.mixture.weights={"plays" = 3.0, "manuals" = 1.0}')
    facts = {step.node: step.estimate.facts for step in planner.make(wanted, store, corpus_bytes=3_000_000)}
    assert facts["pretrain"]["mixture"] == []
    counts = {f"{split}_{what}": 1000 for split in ("train", "validation", "test") for what in ("tokens", "bytes")}
    summary = {"vocab_size": 4096, "test_documents": 9, "sources": {"manuals": 100, "plays": 400, "verse": 50}}
    publish(store, wanted, only="prepare", summary=counts | summary)
    rows = next(s.estimate.facts["mixture"] for s in planner.make(wanted, store) if s.node == "pretrain")
    assert [(row["phase"], row["source"], row["share"]) for row in rows] == [(0, "manuals", 0.25), (0, "plays", 0.75)]
    assert rows[1]["tokens"] == 3 * rows[0]["tokens"]
    assert rows[1]["epochs"] == pytest.approx(rows[0]["epochs"] * 3 / 4)
    other = graph_of(*MIXED, 'pretrain.mixture.weights={"playz" = 1.0}')
    with pytest.raises(ConfigError, match="no source 'playz'"):
        planner.make(other, store)


def test_a_mixture_needs_sequences_of_one_source() -> None:
    with pytest.raises(ConfigError, match=r"needs prepare.pack_by = .source."):
        graph_of("pretrain.mixture.temperature=2.0")


def test_a_model_that_cannot_fit_is_refused_where_it_would_run_and_only_there(store: LocalStore) -> None:
    small = Machine("cpu", 4 * 10**9, "this machine has", shared=True)
    graph = graph_of("pretrain.preset=7b", "pretrain.model.ffn_width=11008")
    with pytest.raises(ConfigError, match=r"pretrain cannot fit: 2 ranks of .* this machine has 4 GB"):
        planner.make(graph, store, machine=small, corpus_bytes=3_000_000)
    planner.make(graph, store, Selection(only="prepare"), machine=small, corpus_bytes=3_000_000)
    publish(store, graph)
    assert planner.is_done(planner.make(graph, store, machine=small, corpus_bytes=3_000_000))


def test_a_step_as_json_has_its_cost_only_where_a_price_is_known(store: LocalStore) -> None:
    (pretrain,) = (s for s in planner.make(graph_of(), store, corpus_bytes=3_000_000) if s.node == "pretrain")
    assert pretrain.as_dict()["estimate"]["cost"] is None
    assert pretrain.seconds is not None
    assert pretrain.as_dict(3.6)["estimate"]["cost"] == pytest.approx(2 * pretrain.seconds / 1000)
