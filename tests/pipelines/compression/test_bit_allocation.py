"""Widths layer by layer through the stage: the budget, what was predicted, and children of mixed widths.

That plain transformers loads them is tested with the other children in `test_export.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.compression import hawq
from models.compression.base import Statistics
from pipelines.compression import bit_allocation, sequential
from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader, read_record
from pipelines.modelio.load import is_private, load_model

MIXED = {"method": "hawq", "budget": 4.0, "group_size": 0, "samples": 8}


def widths(report: dict[str, Any]) -> dict[str, int]:
    """Return layer -> width."""
    return {name: row["bits"] for name, row in report["allocation"]["layers"].items()}


@pytest.mark.parametrize("sensitivity", ["curvature", "gradients", "hessian"])
def test_layers_get_their_own_widths_within_the_budget(
    sensitivity: str, small: Any, compress: Callable[..., Any]
) -> None:
    _, report = compress(small(), MIXED | {"sensitivity": sensitivity})
    told = report["allocation"]
    assert len(set(widths(report).values())) > 1
    assert told["stored_bits"] == report["totals"]["stored_bits"] <= told["budget_bits"]
    assert told["budget_bits"] == int(4.0 * report["totals"]["weights"])
    assert told["predicted"] < min(told["random"])
    assert told["predicted"] <= told["uniform"]
    assert len(told["random"]) == 6


def test_the_same_run_twice_allocates_the_same(small: Any, compress: Callable[..., Any]) -> None:
    one, two = (compress(small(), MIXED)[1] for _ in range(2))
    assert one == two


def test_every_width_is_recorded_and_read_back(small: Any, compress: Callable[..., Any]) -> None:
    out, report = compress(small(), MIXED)
    record = read_record(out / "model")
    assert record is not None
    reader = WeightReader(out / "model")
    for name, width in widths(report).items():
        assert record["layers"][name]["config"]["bits"] == width
        assert max(len(set(row.tolist())) for row in reader.dense(f"{name}.weight")) <= 2**width


def test_layers_that_belong_together_share_a_width(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), MIXED | {"tied_layers": ["*layers.0.self_attn.*", "*.down_proj"]})
    found = widths(report)
    for pattern in ("layers.0.self_attn.", "down_proj"):
        assert len({width for name, width in found.items() if pattern in name}) == 1
    assert len(set(found.values())) > 1


def test_an_encoder_of_mixed_widths_needs_our_loader_and_keeps_the_budget(
    small: Any, compress: Callable[..., Any]
) -> None:
    """Plain transformers unpacks an encoder while loading, by one scheme for all layers."""
    out, report = compress(small(family="encoder"), MIXED)
    assert is_private(out / "model")
    assert report["loads_with"] == "pipelines.modelio.load"
    assert report["totals"]["stored_bits"] <= report["allocation"]["budget_bits"]
    model, reader = load_model(out / "model"), WeightReader(out / "model")
    for name in widths(report):
        assert torch.equal(model.get_parameter(f"{name}.weight"), reader.dense(f"{name}.weight"))


def test_storage_of_lq_lora_is_shared_out_too(small: Any, compress: Callable[..., Any]) -> None:
    table = {"method": "lq_lora", "rank": 1, "samples": 4, "skip": ["model.layers.0.*", "*.self_attn.*"]}
    out, report = compress(small(), table | {"budget": 4.0})
    told = report["allocation"]
    assert told["stored_bits"] == report["totals"]["stored_bits"] <= told["budget_bits"]
    assert told["predicted"] <= told["uniform"]
    assert bool(torch.isfinite(load_model(out / "model")(input_ids=torch.arange(8)[None]).logits).all())


def test_without_a_budget_there_is_no_allocation(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), {"method": "hawq", "budget": 0, "bits": 3, "samples": 8})
    assert "allocation" not in report
    assert report["totals"]["bits_per_weight"] < 4


def test_a_budget_that_is_too_small_is_refused(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="within the budget"):
        compress(small(), MIXED | {"budget": 1.5})


def test_nothing_is_shared_out_where_nothing_is_shown(small: Any) -> None:
    model, reader = meta_init.build(small().parent.path / "model"), WeightReader(small().parent.path / "model")
    names = sequential.targets(model, ())
    assert (
        bit_allocation.make(model, reader, hawq.Method(), hawq.Config(), names=names, shown=None)
        == bit_allocation.Plan()
    )


def test_prices_are_those_of_the_method_on_each_layer(small: Any) -> None:
    bench = small()
    source, config = bench.parent.path / "model", hawq.Config(sensitivity="hessian", widths=(3, 5))
    model, reader = meta_init.build(source), WeightReader(source)
    names = sequential.targets(model, ())[:4]
    tokens = bench.held_BT.numpy()
    shown = bit_allocation.Shown(tokens, tokens, torch.device("cpu"))
    allocation = hawq.Method().allocation(config)
    assert allocation is not None
    prices = bit_allocation.price_all(model, reader, hawq.Method(), allocation, names=names, shown=shown)
    assert prices.weights == sum(reader.dense(f"{name}.weight").numel() for name in names)
    whole, seen = load_model(source), dict[str, torch.Tensor]()
    for name in names:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].detach().flatten(0, -2).double()})
        )
    whole(input_ids=bench.held_BT)
    for row, name in enumerate(names):
        weight, moment = reader.dense(f"{name}.weight"), seen[name].T @ seen[name]
        for column, option in enumerate(allocation.options):
            cost = hawq.Method().cost(weight, Statistics(moment, len(seen[name])), option)
            assert prices.bits_LC[row, column] == cost.stored_bits
            assert prices.cost_LC[row, column] == pytest.approx(cost.loss, rel=1e-3)
