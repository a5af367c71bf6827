"""What each method does to a model that has learned: held-out loss against naive choices at the same stored bits.

Measured on this bench (1.792 nats a byte; ratio of held-out perplexity to the parent's): int8 0.9999; int4 a row RTN
1.0059, GPTQ 1.0020; int3 1.0181 and 1.0044; int2 in groups of 32 1.118 and 1.049; Wanda half 1.059, 2:4 1.147.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.compression import wanda
from pipelines.compression import sequential
from pipelines.compression.baselines import BaselineMethod
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment, compress_blocks
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(bench: Any) -> float:
    """Held-out loss of the parent."""
    return bench.loss(load_model(bench.parent.path / "model"))


def ratio(bench: Any, folder: Path, base: float) -> float:
    """Return held-out perplexity over the parent's."""
    return math.exp(bench.loss(load_model(folder / "model")) - base)


def test_the_bench_has_learned(base: float) -> None:
    assert base < 2.0, "an untrained model hides quantization noise: uniform bytes are 5.5 nats"


def test_int8_costs_less_than_half_a_percent_of_the_loss(bench: Any, compress: Callable[..., Any], base: float) -> None:
    folder, _ = compress(bench, {"method": "rtn", "bits": 8})
    assert bench.loss(load_model(folder / "model")) < 1.005 * base


@pytest.mark.parametrize(
    ("bits", "group", "share"), [(4, 0, 0.75), (3, 0, 0.6), (2, 32, 0.6)], ids=["int4", "int3", "int2-g32"]
)
def test_gptq_loses_less_than_rtn_at_the_same_bytes(
    bits: int, group: int, share: float, bench: Any, compress: Callable[..., Any], base: float
) -> None:
    losses, sizes = {}, set()
    for method in ("rtn", "gptq"):
        folder, report = compress(bench, {"method": method, "bits": bits, "group_size": group})
        losses[method] = ratio(bench, folder, base) - 1
        sizes.add(report["totals"]["bytes"])
    assert len(sizes) == 1
    assert losses["rtn"] > 0.002, "rounding must hurt, or nothing is compared"
    assert losses["gptq"] < share * losses["rtn"]


def test_gptq_reports_its_gain_over_rtn_layer_by_layer(bench: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(bench, {"method": "gptq", "bits": 3, "group_size": 0})
    assert len(report["layers"]) == 21
    for row in report["layers"].values():
        assert row["output_error"] < row["baselines"]["rtn"]
    assert report["errors"]["output"] < 0.5 * report["errors"]["baselines"]["rtn"]


def _pruned_loss(bench: Any, run: CompressionRun, method: Any, config: wanda.Config) -> float:
    """Compress the model of a run with a method and return the held-out loss of the result."""
    assignment = Assignment(method, config, sequential.targets(run.base, ()))
    variant = load_model(run.source)
    for block in compress_blocks(run, assignment):
        for name, layer in block.items():
            variant.get_submodule(name).weight.data.copy_(layer.packed.dequantize())
    return float(bench.loss(variant))


SHOWN = {"method": "wanda", "samples": 48}
EXACT = {"value_bits": 32, "storage": "bitmask"}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_loses_far_less_than_a_random_mask(pattern: Any, bench: Any, base: float, opened: Any) -> None:
    """At 2:4 the held-out loss was no better than magnitude's here (0.175 against 0.173): that is not asserted."""
    config, run = wanda.Config(pattern=pattern, **EXACT), opened(bench, SHOWN)
    random = BaselineMethod(wanda.Method(), "random")
    mine = _pruned_loss(bench, run, wanda.Method(), config) - base
    assert 0.01 < mine < 0.4 * (_pruned_loss(bench, run, random, config) - base)


@pytest.fixture(scope="module")
def outliers(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same function with sixteen input channels of each norm 60 times larger, and their weights 60 times smaller.

    Small models have no outlier channels of their own; large ones do.
    """
    model = load_model(bench.parent.path / "model")
    for layer in model.model.layers:
        pairs = (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
        for norm, readers in pairs:
            norm.weight.data[5:21] *= 60
            for reader in readers:
                reader.weight.data[:, 5:21] /= 60
    folder = tmp_path_factory.mktemp("outliers") / "build"
    model.save_pretrained(folder / "model")
    final = folder.with_name("outliers")
    return artifact.publish(folder, final, stage="pretrain", node="p", identity={}, parents={}, summary={})


def test_outlier_channels_mislead_magnitude_but_not_wanda(
    bench: Any, outliers: Artifact, base: float, opened: Any
) -> None:
    assert bench.loss(load_model(outliers.path / "model")) == pytest.approx(base, rel=1e-4)
    config, run = wanda.Config(**EXACT), opened(bench, SHOWN, parent=outliers)
    plain = _pruned_loss(bench, opened(bench, SHOWN), wanda.Method(), config) - base
    mine = _pruned_loss(bench, run, wanda.Method(), config) - base
    magnitude = _pruned_loss(bench, run, BaselineMethod(wanda.Method(), "magnitude"), config) - base
    assert mine == pytest.approx(plain, rel=0.05)
    assert mine < 0.6 * magnitude, (mine, magnitude)


def test_pruning_then_quantizing_keeps_the_zeros_and_most_of_the_quality(
    bench: Any, compress: Callable[..., Any], base: float
) -> None:
    pruned, _ = compress(bench, {"method": "wanda"} | EXACT)
    parent = artifact.publish(
        pruned, pruned.with_name("pruned"), stage="compress", node="c", identity={}, parents={}, summary={}
    )
    chained, report = compress(bench, {"method": "gptq", "keep_zeros": True, "from": "wanda"}, parent=parent)
    both, alone = ratio(bench, chained, base), ratio(bench, parent.path, base)
    assert both < alone * 1.02
    weight = WeightReader(chained / "model").dense("model.layers.1.mlp.up_proj.weight")
    assert float((weight == 0).float().mean()) >= 0.5
    assert report["totals"]["bits_per_weight"] < 6
