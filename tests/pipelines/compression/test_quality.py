"""What each method does to a model that has learned: held-out loss against naive choices at the same stored bits.

Measured on this bench (1.792 nats a byte; ratio of held-out perplexity to the parent's): int8 0.9999; int4 a row RTN
1.0059, GPTQ 1.0020; int3 1.0181 and 1.0044; int2 in groups of 32 1.118 and 1.049; Wanda half 1.059, 2:4 1.147.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.compression import wanda
from models.compression.base import Packed, Statistics
from pipelines.compression import calibration, sequential
from pipelines.modelio import meta_init
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
        assert row["output_error"] < row["null"]["rtn"]
    assert report["errors"]["output"] < 0.5 * report["errors"]["null"]["rtn"]


class Baseline(wanda.Method):
    """Prunes like one baseline of Wanda."""

    def __init__(self, name: str) -> None:
        self._baseline = name

    def compress(self, weight: torch.Tensor, seen: Statistics, config: wanda.Config) -> Packed:
        return super().baselines(weight, seen, config)[self._baseline]

    def baselines(self, *_: Any) -> dict[str, Packed]:
        return {}


def _pruned_loss(bench: Any, source: Path, method: Any, config: wanda.Config) -> float:
    """Walk the model in `source` with a method and return the held-out loss of the result."""
    model = meta_init.build(source)
    tokens = calibration.sample_tokens(bench.prepare.path, samples=48, seed=0, masked=False)
    steps: Iterator[dict[str, sequential.Layer]] = sequential.walk(
        model,
        WeightReader(source),
        method,
        config,
        names=sequential.targets(model, ()),
        tokens_NT=tokens,
        device=torch.device("cpu"),
    )
    child = load_model(source)
    for block in steps:
        for name, layer in block.items():
            child.get_submodule(name).weight.data.copy_(layer.packed.dequantize())
    return float(bench.loss(child))


EXACT = {"value_bits": 32, "storage": "bitmask"}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_loses_far_less_than_a_random_mask(pattern: Any, bench: Any, base: float) -> None:
    """At 2:4 the held-out loss was no better than magnitude's here (0.175 against 0.173): that is not asserted."""
    config, source = wanda.Config(pattern=pattern, **EXACT), bench.parent.path / "model"
    mine = _pruned_loss(bench, source, wanda, config) - base
    assert 0.01 < mine < 0.4 * (_pruned_loss(bench, source, Baseline("random"), config) - base)


@pytest.fixture(scope="module")
def outliers(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    folder = tmp_path_factory.mktemp("outliers")
    model.save_pretrained(folder)
    return folder


def test_outlier_channels_mislead_magnitude_but_not_wanda(bench: Any, outliers: Path, base: float) -> None:
    assert bench.loss(load_model(outliers)) == pytest.approx(base, rel=1e-4)
    config = wanda.Config(**EXACT)
    plain = _pruned_loss(bench, bench.parent.path / "model", wanda, config) - base
    mine = _pruned_loss(bench, outliers, wanda, config) - base
    magnitude = _pruned_loss(bench, outliers, Baseline("magnitude"), config) - base
    assert mine == pytest.approx(plain, rel=0.05)
    assert mine < 0.6 * magnitude, (mine, magnitude)


def test_pruning_then_quantizing_keeps_the_zeros_and_most_of_the_quality(
    bench: Any, compress: Callable[..., Any], base: float
) -> None:
    from pipelines.core import artifact

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
