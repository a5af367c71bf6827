"""The int8 loader: the arithmetic of a layer, what it refuses, and what it does to a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError
from pipelines.core.stage import StageContext
from pipelines.deploy import int8_inference
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

MakeModel = Callable[..., Artifact]


def compress(parent: Artifact, prepare: Artifact, folder: Path, **table: Any) -> Path:
    """Make a variant and return its model folder."""
    out = folder / "-".join(map(str, table.values()))
    out.mkdir()
    context = StageContext(node="compress.variant", scratch=folder, compute=ComputeConfig(device="cpu"))
    run(
        CompressConfig.model_validate({"baseline_documents": 0} | table),
        {"prepare": prepare, "model": parent},
        out,
        context,
    )
    return out / "model"


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_layer_sums_integer_products_exactly(tokens: int) -> None:
    """Against int64 sums in a loop over rows: the only float operations are the two scales."""
    generator = torch.Generator().manual_seed(tokens)
    x_ND = torch.randn(tokens, 96, generator=generator) * torch.rand(tokens, 1, generator=generator)
    codes_OI = torch.randint(-128, 128, (24, 96), generator=generator, dtype=torch.int8)
    scale_O, bias_O = torch.rand(24, generator=generator) + 0.1, torch.randn(24, generator=generator)
    layer = int8_inference.Int8Linear(codes_OI, scale_O, bias_O)
    codes_ND, scale_N1 = int8_inference.round_tokens(x_ND)
    for row in range(tokens):
        sums_O = codes_OI.long() @ codes_ND[row].long()
        expected_O = sums_O.float() * scale_N1[row] * scale_O + bias_O
        torch.testing.assert_close(layer(x_ND)[row], expected_O, rtol=1e-6, atol=1e-5)
    assert layer(x_ND.view(1, tokens, 96)).shape == (1, tokens, 24)


def test_inputs_are_rounded_to_the_nearest_of_255_codes_a_token() -> None:
    x_ND = torch.tensor([[1.0, -2.0, 0.004, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-3, 5e-4, -1e-3, 2.5e-4]])
    codes_ND, scale_N1 = int8_inference.round_tokens(x_ND)
    assert codes_ND.tolist() == [[64, -127, 0, 0], [0, 0, 0, 0], [127, 64, -127, 32]]
    assert ((codes_ND * scale_N1 - x_ND).abs() <= scale_N1 / 2 + 1e-9).all()


def test_codes_and_scales_are_those_of_the_variant(model_artifact: MakeModel, tmp_path: Path) -> None:
    parent = model_artifact()
    folder = compress(parent, parent, tmp_path, method="rtn", bits=8)
    model = int8_inference.load_model(folder)
    names = [name for name, module in model.named_modules() if isinstance(module, int8_inference.Int8Linear)]
    assert len(names) == 2 * 7
    for name in names:
        layer = model.get_submodule(name)
        dense_OI = WeightReader(folder).dense(f"{name}.weight")
        assert torch.equal(layer.codes_IO.t().float() * layer.scale_O[:, None], dense_OI)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_logits_stay_close_to_those_of_the_variant_in_float(
    family: str, model_artifact: MakeModel, tmp_path: Path
) -> None:
    """Relative error of untrained logits: measured 0.009 (decoder) and 0.006 (encoder)."""
    parent = model_artifact(family=family)
    folder = compress(parent, parent, tmp_path, method="rtn", bits=8)
    ids = torch.arange(4, 52).view(2, 24)
    with torch.no_grad():
        found, expected = (load(folder)(input_ids=ids).logits for load in (int8_inference.load_model, load_model))
    error = float((found - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.03


def test_decoding_with_a_cache_says_what_the_whole_sequence_says(model_artifact: MakeModel, tmp_path: Path) -> None:
    """Scales belong to tokens, so a token is computed alike alone and in company."""
    parent = model_artifact()
    model = int8_inference.load_model(compress(parent, parent, tmp_path, method="rtn", bits=8))
    ids = torch.arange(10, 30).view(1, 20)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        alone = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "rtn", "bits": 8, "group_size": 32}, "one scale a row"),
        ({"method": "rtn", "bits": 8, "symmetric": False}, "one scale a row"),
        ({"method": "magnitude", "storage": "bitmask"}, "not packed as integers"),
    ],
    ids=["groups", "zero points", "pruned"],
)
def test_what_is_not_integers_by_row_is_refused(
    table: dict[str, Any], message: str, model_artifact: MakeModel, tmp_path: Path
) -> None:
    parent = model_artifact()
    with pytest.raises(ConfigError, match=message):
        int8_inference.load_model(compress(parent, parent, tmp_path, **table))


def test_a_model_that_is_not_compressed_is_refused(model_artifact: MakeModel) -> None:
    with pytest.raises(ConfigError, match="no packed layers"):
        int8_inference.load_model(model_artifact().path / "model")


@pytest.mark.slow
def test_a_trained_model_loses_less_than_half_a_percent(bench: Any, tmp_path: Path) -> None:
    folder = compress(bench.parent, bench.prepare, tmp_path, method="rtn", bits=8)
    base = bench.loss(load_model(bench.parent.path / "model"))
    loss = bench.loss(int8_inference.load_model(folder))
    assert abs(loss - bench.loss(load_model(folder))) > 1e-6, "inputs are rounded too"
    assert loss < 1.005 * base
