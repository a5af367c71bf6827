"""The whole stage on trained tiny models: base, variant, encoder, truncation, determinism and refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import IntegrityError, NumericError
from pipelines.core.stage import Progress, StageContext
from pipelines.evaluation import stage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.measure import heldout, intervals
from pipelines.stages import STAGES


def _evaluate(config: EvaluateConfig, inputs: dict[str, Artifact], out: Path, context: StageContext) -> Artifact:
    """Run the stage and publish its folder as the wrapper does."""
    build = out / "build"
    build.mkdir(parents=True)
    summary = stage.run(config, inputs, build, context)
    return artifact.publish(
        build,
        out / "evaluate",
        stage="evaluate",
        node=context.node,
        identity={"stage": "evaluate"},
        parents={},
        summary=summary,
        observations=STAGES["evaluate"].observations,
    )


@pytest.fixture(scope="module")
def base(
    prepared: Artifact, decoder_artifact: Artifact, small: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    folder = tmp_path_factory.mktemp("base")
    context = StageContext(node="evaluate.pretrain", scratch=folder / "scratch", compute=ComputeConfig(device="cpu"))
    return _evaluate(small, {"prepare": prepared, "model": decoder_artifact}, folder, context)


@pytest.fixture(scope="module")
def variant_artifact(decoder: Any, save_model: Callable[[Any], Artifact]) -> Artifact:
    """The decoder with its linear layers rounded to 4 bits per output row."""
    variant = copy.deepcopy(decoder)
    with torch.no_grad():
        for module in variant.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(dim=1, keepdim=True) / 7
                module.weight.copy_((module.weight / scale).round() * scale)
    return save_model(variant)


def test_the_headline_follows_from_the_arrays(base: Artifact, prepared: Artifact, small: EvaluateConfig) -> None:
    evaluation = base.read_json("evaluation.json")
    nats, sizes = (np.load(base.path / f"document_{name}.npy") for name in ("nats", "bytes"))
    held = heldout.load(prepared.path)
    assert (nats.dtype, sizes.dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(sizes, held.sizes)
    assert evaluation["bits_per_byte"]["value"] == pytest.approx(nats.sum() / sizes.sum() / np.log(2.0), rel=1e-12)
    assert (
        evaluation["bits_per_byte"]["low"] < evaluation["bits_per_byte"]["value"] < evaluation["bits_per_byte"]["high"]
    )
    assert evaluation["scored_tokens"] == sum(len(ids) - 1 for ids in held.tokens)
    assert (evaluation["documents"], evaluation["truncated"]) == (len(held.documents), False)
    assert evaluation["confidence"] == small.confidence


def test_a_trained_decoder_beats_the_unigram_and_an_untrained_one_does_not(
    base: Artifact, prepared: Artifact, decoder: Any, save_model: Callable[[Any], Artifact], context: StageContext,
    tmp_path: Path,
) -> None:  # fmt: skip
    torch.manual_seed(1)
    config = EvaluateConfig.model_validate({"tasks": {"names": []}, "probes": {"latency": {"enabled": False}}})
    blank = save_model(type(decoder)(decoder.config))
    untrained = _evaluate(config, {"prepare": prepared, "model": blank}, tmp_path, context)
    trained, null = base.read_json("evaluation.json"), untrained.read_json("evaluation.json")
    assert trained["bits_per_byte"]["high"] < trained["baselines"]["order1"]
    assert null["bits_per_byte"]["low"] > null["baselines"]["order1"]
    assert null["baselines"] == trained["baselines"]
    assert sorted(trained["baselines"]) == ["gzip", "order1", "order2", "order3", "xz"]
    assert trained["baselines_truncated"] is False
    assert null["tasks"] == {}
    assert null["harness"] is None


def test_the_result_is_the_same_bytes_every_time(
    base: Artifact, prepared: Artifact, decoder_artifact: Artifact, small: EvaluateConfig, context: StageContext,
    tmp_path: Path,
) -> None:  # fmt: skip
    again = _evaluate(small, {"prepare": prepared, "model": decoder_artifact}, tmp_path, context)
    assert again.digest == base.digest
    names = {n for n, record in again.manifest.files.items() if not record.observation}
    assert {"evaluation.json", "task_outcomes.json", "document_nats.npy", "tasks/cloze.jsonl"} <= names
    assert "observations.json" not in names


def test_a_variant_is_compared_with_its_base_document_by_document(
    base: Artifact, prepared: Artifact, decoder_artifact: Artifact, variant_artifact: Artifact, small: EvaluateConfig,
    context: StageContext, tmp_path: Path,
) -> None:  # fmt: skip
    inputs = {"prepare": prepared, "model": variant_artifact, "base_model": decoder_artifact}
    variant = _evaluate(small, inputs | {"base_evaluation": base}, tmp_path, context)
    evaluation = variant.read_json("evaluation.json")
    versus = evaluation["versus_base"]
    nats, base_nats = (np.load(a.path / "document_nats.npy") for a in (variant, base))
    ratio = versus["bits_per_byte_ratio"]
    assert ratio["value"] == pytest.approx(nats.sum() / base_nats.sum(), rel=1e-12)
    assert 1.0 < ratio["low"] <= ratio["value"] <= ratio["high"] < 1.5
    alone = evaluation["bits_per_byte"]
    assert ratio["high"] - ratio["low"] < (alone["high"] - alone["low"]) / alone["value"], "pairing narrows"
    assert versus["kl_nats_per_token"] > 0.0
    assert 0.3 < versus["top1_agreement"] < 1.0
    assert 1500 < versus["kl_tokens"] <= 4096
    assert versus["size_ratio"] == pytest.approx(1.0, abs=0.01)
    assert evaluation["baselines"] == {}
    for name, row in evaluation["tasks"].items():
        difference = row["accuracy"] - base.read_json("evaluation.json")["tasks"][name]["accuracy"]
        assert versus["task_accuracy_difference"][name]["value"] == pytest.approx(difference)
        assert row["hash"] == base.read_json("evaluation.json")["tasks"][name]["hash"]
    rows = intervals.table({"pretrain": intervals.read(base.path), "int4": intervals.read(variant.path)})
    assert [row["kind"] for row in rows[:3]] == ["base", "variant", "baseline"]
    assert rows[1]["ratio"] == ratio["value"]


def test_a_model_compared_with_itself_differs_by_exactly_nothing(
    base: Artifact, prepared: Artifact, decoder_artifact: Artifact, context: StageContext, tmp_path: Path
) -> None:
    config = EvaluateConfig.model_validate(
        {"tasks": {"items": 24, "names": []}, "probes": {"latency": {"enabled": False}}}
    )
    inputs = {"prepare": prepared, "model": decoder_artifact, "base_model": decoder_artifact}
    found = _evaluate(config, inputs | {"base_evaluation": base}, tmp_path, context)
    versus = found.read_json("evaluation.json")["versus_base"]
    assert versus["bits_per_byte_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (versus["kl_nats_per_token"], versus["top1_agreement"], versus["size_ratio"]) == (0.0, 1.0, 1.0)


def test_a_trained_encoder_beats_the_unigram_at_masked_tokens_by_a_clear_margin(
    prepared: Artifact, encoder_artifact: Artifact, small: EvaluateConfig, context: StageContext, tmp_path: Path
) -> None:
    found = _evaluate(small, {"prepare": prepared, "model": encoder_artifact}, tmp_path, context)
    evaluation = found.read_json("evaluation.json")
    assert evaluation["family"] == "encoder"
    assert list(evaluation["baselines"]) == ["unigram"]
    # The interval is over 12 documents, whose difficulty both arms share; the margin is of the estimates.
    assert evaluation["bits_per_byte"]["value"] < 0.9 * evaluation["baselines"]["unigram"]
    share = evaluation["scored_tokens"] / sum(len(ids) - 2 for ids in heldout.load(prepared.path).tokens)
    assert 0.13 < share < 0.17
    sizes = np.load(found.path / "document_bytes.npy")
    assert evaluation["bits_per_token"] == pytest.approx(
        evaluation["bits_per_byte"]["value"] * sizes.sum() / evaluation["scored_tokens"], rel=1e-12
    )
    assert list(evaluation["tasks"]) == ["cloze"]
    assert set(evaluation["skipped_tasks"]) == {"next_line", "addition"}


def test_a_truncated_evaluation_says_so_in_result_summary_and_table(
    prepared: Artifact, decoder_artifact: Artifact, context: StageContext, tmp_path: Path
) -> None:
    config = EvaluateConfig.model_validate(
        {"max_documents": 3, "baseline_tokens": 1000, "tasks": {"names": []}, "probes": {"latency": {"enabled": False}}}
    )
    found = _evaluate(config, {"prepare": prepared, "model": decoder_artifact}, tmp_path, context)
    evaluation = found.read_json("evaluation.json")
    assert evaluation["truncated"] is True
    assert evaluation["documents"] == 3 < evaluation["documents_total"]
    assert evaluation["baselines_truncated"] is True
    assert found.manifest.summary["truncated"] is True
    assert intervals.table({"pretrain": intervals.read(found.path)})[0]["truncated"] is True


def test_latency_and_memory_are_observations_only(
    prepared: Artifact, decoder_artifact: Artifact, context: StageContext, tmp_path: Path
) -> None:
    latency = {"prompt_tokens": 16, "new_tokens": 2, "repeats": 1}
    config = EvaluateConfig.model_validate({"max_documents": 2, "tasks": {"names": []}, "probes": {"latency": latency}})
    reports: list[Progress] = []
    reporting = replace(context, report=reports.append)
    found = _evaluate(config, {"prepare": prepared, "model": decoder_artifact}, tmp_path, reporting)
    observed = found.read_json("observations.json")
    assert observed["latency"]["decode_ms_per_token"] > 0.0
    assert observed["latency"]["peak_memory_bytes"] > 0
    assert observed["wall_s"] > 0.0
    assert found.manifest.summary["latency"]["prefill_ms_per_token"] == observed["latency"]["prefill_ms_per_token"]
    assert not any("latency" in json.dumps(found.read_json(n)) for n in ("evaluation.json", "task_outcomes.json"))
    assert {report.unit for report in reports} == {"tokens", "probe"}


def test_a_diverged_model_is_a_numeric_error(
    prepared: Artifact, decoder: Any, save_model: Callable[[Any], Artifact], small: EvaluateConfig,
    context: StageContext, tmp_path: Path,
) -> None:  # fmt: skip
    broken = copy.deepcopy(decoder)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(NumericError, match="logits that are not finite"):
        _evaluate(small, {"prepare": prepared, "model": save_model(broken)}, tmp_path, context)


def test_a_model_of_other_data_is_refused_before_it_is_loaded(
    prepared: Artifact, decoder: Any, save_model: Callable[[Any], Artifact], small: EvaluateConfig,
    context: StageContext, tmp_path: Path,
) -> None:  # fmt: skip
    foreign = save_model(decoder)
    path = foreign.path / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|mask|>", "<|hide|>"))
    with pytest.raises(IntegrityError, match="is not the tokenizer of the prepared data"):
        _evaluate(small, {"prepare": prepared, "model": foreign}, tmp_path, context)
