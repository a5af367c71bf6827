"""Choices on validation text: the calibrator of int8, and which layers partial quantization leaves alone.

The bench has no outliers of its own, so they are put in without changing the function: four channels of both norms of
the first block are 60 times larger, and the columns that read them 60 times smaller. (In all three blocks, 9 of 21
layers had to stay for the same tolerance, not 25 %.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.compression import int8
from models.compression.base import Packed
from pipelines.compression import layer_selection, quick_eval, sequential, streaming
from pipelines.compression.quick_eval import QuickEval
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

CPU = torch.device("cpu")
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def outliers(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bench model with outlier channels in front of the layers of its first block."""
    folder = tmp_path_factory.mktemp("outliers") / "build"
    model = load_model(bench.parent.path / "model")
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
        (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ):
        norm.weight.data[5:9] *= 60
        for reader in readers:
            reader.weight.data[:, 5:9] /= 60
    model.save_pretrained(folder / "model")
    for path in (bench.parent.path / "model").iterdir():
        if not (folder / "model" / path.name).exists():
            (folder / "model" / path.name).write_bytes(path.read_bytes())
    final = folder.with_name("outliers")
    return artifact.publish(folder, final, stage="pretrain", node="p", identity={}, parents={}, summary={})


@pytest.fixture(scope="module")
def run(bench: Any, outliers: Artifact, opened: Any) -> CompressionRun:
    """The model with outliers, opened for int8, which is shown inputs."""
    return opened(bench, {"method": "int8", "samples": 32}, parent=outliers)


@pytest.fixture(scope="module")
def text(bench: Any) -> QuickEval:
    """Four validation documents."""
    made = quick_eval.build(bench.prepare.path, 4, "decoder", CPU, end="last")
    assert made is not None
    return made


def by_largest_value(run: CompressionRun) -> Assignment:
    """Every layer on int8, inputs on the range of their largest value."""
    return Assignment(int8.Method(), int8.Config(calibrator="max"), sequential.targets(run.base, ()))


def ratio_of(run: CompressionRun, text: QuickEval, packed: Mapping[str, Packed]) -> float:
    """Return the perplexity over the base's with some layers compressed."""
    nats = [float(streaming.base_nats(run, text, "x", some).sum()) for some in (packed, {})]
    return math.exp((nats[0] - nats[1]) / int(text.tokens_D.sum()))


@pytest.mark.slow
def test_outliers_change_nothing_until_inputs_are_rounded_with_one_scale(
    bench: Any, run: CompressionRun, text: QuickEval, opened: Any
) -> None:
    base = bench.loss(load_model(bench.parent.path / "model"))
    assert bench.loss(load_model(run.source)) == pytest.approx(base, rel=1e-3)
    runs = (opened(bench, {"method": "int8", "samples": 32}), run)
    ratios = [ratio_of(one, text, layer_selection.Shelf.filled(one, by_largest_value(one))) for one in runs]
    assert ratios[0] < 1.01
    assert ratios[1] > 1.08


@pytest.mark.slow
def test_leaving_the_most_sensitive_layers_recovers_what_random_ones_do_not(
    run: CompressionRun, text: QuickEval
) -> None:
    """Chosen on four documents, checked on others: to 1.02 with a quarter of the layers, random layers do not."""
    assignment = by_largest_value(run)
    names = assignment.names
    partial = layer_selection.leave_alone(run, assignment, text, tolerance=TOLERANCE)
    assert partial.ratio_of_all > 1.08
    assert partial.ratio <= 1 + TOLERANCE
    assert 1 <= len(partial.kept) <= len(names) / 4
    assert all("layers.0" in name for name in partial.kept), "where the outliers are"
    packed = layer_selection.Shelf.filled(run, assignment)

    def ratio(kept: list[str]) -> float:
        return ratio_of(run, text, packed.only([name for name in names if name not in kept]))

    draws = [np.random.default_rng(n).choice(names, len(partial.kept), replace=False).tolist() for n in range(5)]
    assert ratio(partial.kept) == pytest.approx(partial.ratio)
    assert statistics.median(ratio(draw) for draw in draws) > 1 + 3 * TOLERANCE


@pytest.mark.slow
def test_the_stage_leaves_those_layers_as_they_are(
    bench: Any, outliers: Artifact, compress: Callable[..., Any]
) -> None:
    table = {"method": "int8", "calibrator": "max", "tolerance": TOLERANCE, "samples": 32}
    out, report = compress(bench, table, parent=outliers)
    kept = report["partial"]["kept"]
    assert kept
    assert not set(kept) & set(report["layers"])
    assert len(kept) + len(report["layers"]) == 21
    child, parent = WeightReader(out / "model"), WeightReader(outliers.path / "model")
    for name in kept:
        assert torch.equal(child.dense(f"{name}.weight"), parent.dense(f"{name}.weight"))
    base = bench.loss(load_model(outliers.path / "model"))
    assert math.exp(bench.loss(load_model(out / "model")) - base) < 1.04, "on test text, not that of the choice"


@pytest.mark.slow
def test_the_best_calibrator_is_the_one_with_the_least_loss(run: CompressionRun, text: QuickEval) -> None:
    configs = [int8.Config.model_validate({"calibrator": name}) for name in ("max", "p99.9", "entropy")]
    best, losses = layer_selection.best_candidate(run, by_largest_value(run), configs, text)
    assert losses[best.config.label] == min(losses.values())
    assert losses["max"] > min(losses.values()) + 0.02, "with outliers the largest value is a bad range"


def test_choices_need_validation_documents(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="validation documents"):
        compress(small(), {"method": "int8", "calibrator": "best"})
    with pytest.raises(ConfigError, match="validation documents"):
        compress(small(), {"method": "rtn", "tolerance": 0.1})


def test_a_tolerance_that_no_layer_meets_is_refused() -> None:
    """Every compressed layer doubles the perplexity."""
    names = [f"layer-{number}" for number in range(5)]

    def ratio(compressed: Sequence[str]) -> float:
        return float(2 ** len(compressed))

    with pytest.raises(ConfigError, match=r"2\.0000 times the base's with one layer left"):
        layer_selection.within_tolerance(names, ratio, tolerance=0.1)
    partial = layer_selection.within_tolerance(names, ratio, tolerance=1.0)
    assert len(partial.kept) == len(names) - 1


def test_texts_of_either_end_share_no_document_and_are_the_same_every_time(bench: Any) -> None:
    first, last, again = (
        quick_eval.build(bench.prepare.path, 3, "decoder", CPU, end=end) for end in ("first", "last", "first")
    )
    assert first is not None
    assert last is not None
    assert again is not None
    assert first.documents == last.documents == 3
    assert max(first.tokens_D) <= quick_eval.DOCUMENT_TOKENS
    rows = [{tuple(row) for batch in one.batches for row in batch.ids.tolist()} for one in (first, last, again)]
    assert rows[0] == rows[2]
    assert not rows[0] & rows[1]


def test_fewer_than_two_documents_are_no_text_to_judge_on(tmp_path: Path) -> None:
    assert quick_eval.build(tmp_path, 8, "decoder", CPU, end="first") is None
