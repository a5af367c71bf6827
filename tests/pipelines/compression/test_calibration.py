"""Calibration against a plain forward pass of the whole model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures.config import IGNORED
from models.architectures.documents import keep_apart
from models.compression import rtn
from models.compression.base import Needs, Packed, Statistics
from pipelines.compression import calibration, sequential
from pipelines.compression.sequential import Assignment, compress_blocks
from pipelines.core.errors import IntegrityError
from pipelines.modelio import description as describe
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model
from tests.pipelines import families
from tests.pipelines.compression.conftest import IDS, text_of, write_prepare


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
    prefix = calibration.enter(model, layers, text_of(bench.prepare, tokens), torch.device("cpu"))
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


BOS, EOS, PAD = (IDS[name] for name in ("bos_id", "eos_id", "pad_id"))
ROW = [BOS, 10, 11, 12, EOS, BOS, 20, 21, EOS, PAD, 30, 31, PAD, PAD]
"""Two documents, the rest of a third, and padding."""


def test_a_sequence_is_cut_where_documents_begin_and_padding_is_left_out(tmp_path: Path) -> None:
    rows = np.array([ROW, [*range(40, 54)], [BOS, 60, 61, 62, EOS, *[PAD] * 9]])
    text = text_of(write_prepare(tmp_path / "prepare", torch.from_numpy(rows)), rows)
    assert [batch.tokens_BL.tolist() for batch in text] == [
        [[30, 31]],
        [[BOS, 20, 21, EOS]],
        [[BOS, 10, 11, 12, EOS], [BOS, 60, 61, 62, EOS]],
        [[*range(40, 54)]],
    ]
    assert text[2].labels_BL.tolist() == [[10, 11, 12, EOS, IGNORED], [60, 61, 62, EOS, IGNORED]]
    assert text[0].labels_BL.tolist() == [[31, IGNORED]]


def test_a_batch_has_at_most_as_many_tokens_as_the_sequences_that_it_stands_for(tmp_path: Path) -> None:
    rows = np.array([[BOS, 1, EOS, BOS, 2, EOS, BOS, 3, EOS, PAD]] * 7)
    prepare = write_prepare(tmp_path / "prepare", torch.from_numpy(rows)).path
    text = calibration.batches(prepare, rows, rows, sequences=2)
    assert [batch.tokens_BL.shape for batch in text] == [(6, 3)] * 3 + [(3, 3)]
    assert [batch.tokens_BL[0, 1] for batch in text] == [1, 1, 1, 1]


def hessians(base: PreTrainedModel, prepare: Path, rows: Any, *, layers: int = 99) -> dict[str, Tensor]:
    """Return X^T X of the linear layers of the blocks of a model over packed sequences, by the walk of the stage."""
    text, in_tuples = batches_of(prepare, rows), describe.of_model(copy.deepcopy(base)).in_tuples
    stack, blocks = meta_init.blocks(base)
    prefix = calibration.enter(base, blocks, text, torch.device("cpu"), in_tuples=in_tuples)
    found: dict[str, Tensor] = {}
    for index, block in enumerate(blocks[:layers]):
        place = f"{stack}.{index}"
        linear = calibration.linear_layers(base, place, sequential.targets(base, ()))
        seen = calibration.measure(block, linear, index, prefix)
        found |= {name: statistics.hessian_II for name, statistics in seen.items() if statistics.hessian_II is not None}
        prefix.advance(index, block)
    return found


def batches_of(prepare: Path, rows: Any) -> list[calibration.Batch]:
    return calibration.batches(prepare, rows, calibration.labels(prepare, rows, seed=0, masked=False))


def packed(first: int, length: int = 12) -> Any:
    """Return a sequence of a document that depends on `first`, and of another that is always the same."""
    one = [(first * 7 + 5 * n) % 50 + 5 for n in range(length - 2)]
    return np.array([[1, *one, 2, 1, *range(20, 28), 2, 3, 3]])


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_another_document_beside_it_moves_nothing_of_what_a_document_adds(family: str, tmp_path: Path) -> None:
    """H(A, B) - H(A) is what B adds, and H(A', B) - H(A') is the same, in models of every family."""
    base = families.build(family).eval()
    meta_init.linearize(base)
    ids = {"bos_id": 1, "eos_id": 2, "pad_id": 3, "mask_id": 4}
    prepare = write_prepare(tmp_path / "prepare", torch.from_numpy(packed(1)), ids, families.VOCABULARY).path
    alone = hessians(base, prepare, packed(1)[:, 12:22])
    for first in (1, 4):
        both, company = hessians(base, prepare, packed(first)), hessians(base, prepare, packed(first)[:, :12])
        for name, expected in alone.items():
            scale = expected.abs().max()
            assert torch.allclose((both[name] - company[name]) / scale, expected / scale, atol=1e-5), name


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@torch.no_grad()
def test_layers_see_in_calibration_what_they_see_in_training(family: str, tmp_path: Path, small: Any) -> None:
    """The reference is one pass of the whole model over the packed sequence with the document mask of training."""
    rows = np.array([ROW, [BOS, *range(70, 82), EOS], [*ROW[5:], PAD, BOS, 90, 91, EOS]])
    prepare = write_prepare(tmp_path / "prepare", torch.from_numpy(rows)).path
    base = load_model(small(family=family, layers=3).parent.path / "model")
    mine = hessians(base, prepare, rows)
    whole = hessians_without_mask(base, list(mine), rows)
    keep_apart(base, bos_id=BOS, pad_id=PAD)
    seen = _inputs(base, list(mine), torch.from_numpy(rows))
    text = torch.from_numpy(rows).flatten() != PAD
    for name, hessian in mine.items():
        rows_NI = seen[name][text].double()
        expected, scale = rows_NI.T @ rows_NI, hessian.abs().max()
        assert torch.allclose(hessian / scale, expected / scale, atol=1e-5), name
    last = list(mine)[-1]
    assert not torch.allclose(whole[last], mine[last], rtol=1e-2), "without the mask it is another matrix"


def hessians_without_mask(base: PreTrainedModel, names: list[str], rows: Any) -> dict[str, Tensor]:
    seen = _inputs(base, names, torch.from_numpy(rows))
    return {name: seen[name].double().T @ seen[name].double() for name in names}


def test_batches_that_are_learned_from_together_have_every_length(small: Any) -> None:
    hidden = [torch.zeros(count, length, 4) for count, length in ((4, 2), (2, 4), (1, 7), (1, 8), (1, 8), (2, 8))]
    prefix = calibration.Prefix(hidden, lambda _number: [{}], batch_tokens=16)
    assert prefix.sizes == [8, 8, 7, 8, 8, 16]
    assert prefix.groups() == [[0, 3], [1, 4], [2, 5]]
