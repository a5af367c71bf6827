"""Calibration against a plain forward pass of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.compression import rtn
from models.compression.base import Needs, Packed, Statistics
from pipelines.compression import calibration, sequential
from pipelines.compression.sequential import Assignment, compress_blocks
from pipelines.core.errors import IntegrityError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model


def _recorded(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Run the whole model once and return X^T X at each named layer."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            sums[name] = rows.T @ rows

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_each_layer_sees_the_outputs_of_the_compressed_prefix(family: str, small: Any, opened: Any) -> None:
    """Replay: before block n is compressed, its inputs are those of a model whose blocks below n are compressed."""
    bench = small(family=family, layers=4)
    run = opened(bench, {"method": "gptq", "samples": 12})
    tokens, names = run.tokens_NT, sequential.targets(run.base, ())
    seen: dict[str, Any] = {}

    class Spy(rtn.Method):
        def compress(self, weight: Tensor, statistics: Any, config: Any) -> Any:
            seen[names[len(seen)]] = statistics
            return super().compress(weight, statistics, config)

        def needs(self, _config: Any) -> Needs:
            return Needs(sequences=True)

    replay = load_model(run.source)
    for index, block in enumerate(compress_blocks(run, Assignment(Spy(), rtn.Config(bits=2), names))):
        expected = _recorded(replay, list(block), torch.from_numpy(tokens))
        for name in block:
            assert seen[name].tokens == tokens.size, index
            scale = expected[name].abs().max()
            assert torch.allclose(seen[name].hessian_II / scale, expected[name] / scale, atol=1e-5), name
        for name, layer in block.items():
            replay.get_submodule(name).weight.data.copy_(layer.packed.dequantize())


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_sampled_rows_come_from_the_compressed_prefix_and_from_the_original(
    family: str, small: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay both models whole; a layer's rows are those of its input, the same tokens in both, in order."""
    bench = small(family=family, layers=3)
    monkeypatch.setattr(calibration.sample_rows, "__defaults__", (100,))
    run = opened(bench, {"method": "gpfq", "samples": 10})
    tokens, names = run.tokens_NT, sequential.targets(run.base, ())
    seen = dict[str, Statistics]()

    class Spy(rtn.Method):
        def compress(self, weight: Tensor, statistics: Statistics, config: rtn.Config) -> Packed:
            seen[names[len(seen)]] = statistics
            return super().compress(weight, statistics, config)

        def needs(self, _config: rtn.Config) -> Needs:
            return Needs(sequences=True, inputs=True)

    steps = compress_blocks(run, Assignment(Spy(), rtn.Config(bits=2), names))
    replay, rows = load_model(run.source), torch.from_numpy(calibration.sample_rows(tokens.size, 100))
    original = _inputs(replay, names, torch.from_numpy(tokens))
    for block in steps:
        behind = _inputs(replay, list(block), torch.from_numpy(tokens))
        for name in block:
            mine, reference = seen[name].inputs_NI, seen[name].reference_NI
            assert mine is not None
            assert reference is not None
            assert torch.allclose(mine, behind[name][rows], atol=1e-4), name
            highest = seen[name].highest_I
            assert highest is not None
            assert torch.allclose(highest, behind[name].abs().amax(0), atol=1e-4), "of all tokens, not of the rows"
            assert torch.allclose(reference, original[name][rows], atol=1e-4), name
        for name, layer in block.items():
            replay.get_submodule(name).weight.data.copy_(layer.packed.dequantize())
    last = seen[names[-1]]
    assert not torch.allclose(last.inputs_NI, last.reference_NI, atol=1e-2), "two bits must show"  # type: ignore[arg-type]


def _inputs(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs [tokens, I] of each named layer in a pass of the whole model."""
    kept: dict[str, Tensor] = {}

    def keeping(name: str) -> Any:
        return lambda _module, inputs: kept.update({name: inputs[0].flatten(0, -2)})

    handles = [model.get_submodule(name).register_forward_pre_hook(keeping(name)) for name in names]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return kept


def test_rows_are_bounded_distinct_increasing_and_always_the_same() -> None:
    rows = calibration.sample_rows(10_000, 500)
    assert len(rows) == 500
    assert (np.diff(rows) > 0).all()
    assert rows[0] < 200
    assert rows[-1] > 9_800
    assert np.array_equal(rows, calibration.sample_rows(10_000, 500))
    assert np.array_equal(calibration.sample_rows(60, 500), np.arange(60))


def test_rows_are_sampled_only_on_request(small: Any) -> None:
    bench = small()
    source = bench.parent.path / "model"
    model, reader = meta_init.build(source), WeightReader(source)
    stack, layers = meta_init.blocks(model)
    meta_init.load_rest(model, stack, reader, torch.device("cpu"))
    meta_init.load(layers[0], f"{stack}.0", reader, torch.device("cpu"), torch.float32)
    tokens = calibration.sample_tokens(bench.prepare.path, samples=4, seed=0, masked=False)
    prefix = calibration.enter(model, layers, tokens, torch.device("cpu"))
    before = [hidden.clone() for hidden in prefix.hidden]
    seen = calibration.measure(layers[0], {"up": layers[0].mlp.up_proj}, 0, prefix)  # type: ignore[union-attr, dict-item]
    assert seen["up"].inputs_NI is None
    assert seen["up"].reference_NI is None
    assert seen["up"].fisher_OI is None
    assert all(torch.equal(a, b) for a, b in zip(before, prefix.hidden, strict=True)), "measuring moves nothing"


def test_the_same_seed_takes_the_same_text_and_another_does_not(small: Any) -> None:
    prepare = small().prepare.path
    one, same, other = (calibration.sample_tokens(prepare, samples=8, seed=s, masked=False) for s in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 8


def test_a_small_split_is_taken_whole(small: Any) -> None:
    assert calibration.sample_tokens(small().prepare.path, samples=999, seed=0, masked=False).shape == (24, 96)


def test_an_encoder_sees_three_tokens_in_ten_masked_and_no_special_one(small: Any) -> None:
    prepare = small().prepare.path
    plain = calibration.sample_tokens(prepare, samples=24, seed=0, masked=False)
    shown = calibration.sample_tokens(prepare, samples=24, seed=0, masked=True)
    hidden = shown == 259
    assert np.array_equal(shown[~hidden], plain[~hidden])
    assert 0.25 < hidden.mean() < 0.35
    assert not hidden[plain >= 256].any()


def test_an_empty_train_split_is_refused(tmp_path: Path) -> None:
    split = {"shards": [], "sequences": 0}
    index = {"format": 1, "dtype": "uint16", "sequence_length": 8, "splits": {"train": split}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="nothing to calibrate on"):
        calibration.sample_tokens(tmp_path, samples=4, seed=0, masked=False)


@pytest.mark.parametrize(("count", "size"), [(24, 8), (7, 7), (13, 1), (10, 5)])
def test_batches_have_one_size(count: int, size: int, small: Any) -> None:
    bench = small()
    model = meta_init.build(bench.parent.path / "model")
    stack, layers = meta_init.blocks(model)
    meta_init.load_rest(model, stack, WeightReader(bench.parent.path / "model"), torch.device("cpu"))
    tokens = calibration.sample_tokens(bench.prepare.path, samples=count, seed=0, masked=False)
    prefix = calibration.enter(model, layers, tokens, torch.device("cpu"))
    assert [len(batch) for batch in prefix.hidden] == [size] * (count // size)
    assert len(prefix.arguments) == len(layers)
