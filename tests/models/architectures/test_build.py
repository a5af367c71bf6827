"""Models as built: weights from the seed alone, positions and attention as the family promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from models.architectures import decoder, encoder
from models.architectures.build import build, initial_tensor
from models.architectures.config import ArchitectureConfig

FAMILIES = ("decoder", "encoder")


def architecture(family: str, **values: Any) -> ArchitectureConfig:
    tokens = {"vocab_size": 101, "max_positions": 32, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    shape = {"width": 32, "layers": 3, "heads": 4, "ffn_width": 56, "local_window": 6}
    return ArchitectureConfig.model_validate({"family": family, **shape, **tokens, **values})


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_depend_on_the_seed_alone(family: str) -> None:
    torch.manual_seed(1)
    first = build(architecture(family), seed=7).state_dict()
    torch.manual_seed(2)
    again, other = (build(architecture(family), seed=seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["model.layers.1.mlp." + _matrix(family)], other["model.layers.1.mlp." + _matrix(family)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_building_leaves_the_global_generator_alone(family: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(architecture(family), seed=0)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deeper_model_starts_with_the_same_embedding(family: str) -> None:
    shallow, deep = (build(architecture(family, layers=n), seed=0).get_input_embeddings().weight for n in (2, 5))
    assert torch.equal(shallow, deep)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_finite_and_tied_matrices_are_one(family: str) -> None:
    model = build(architecture(family), seed=0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = build(architecture(family, tie_embeddings=False), seed=0)
    assert not torch.equal(untied.get_output_embeddings().weight, untied.get_input_embeddings().weight)


def test_matrices_have_the_asked_spread_and_residual_outputs_less() -> None:
    shape = torch.Size((400, 300))
    plain = initial_tensor("layers.0.mlp.up_proj.weight", shape, seed=0, std=0.05, layers=8)
    output = initial_tensor("layers.0.mlp.down_proj.weight", shape, seed=0, std=0.05, layers=8)
    assert plain.std().item() == pytest.approx(0.05, rel=0.01)
    assert plain.mean().item() == pytest.approx(0.0, abs=5e-4)
    assert output.std().item() == pytest.approx(0.05 / math.sqrt(16), rel=0.01)


def test_gains_start_at_one_and_biases_at_zero() -> None:
    assert torch.equal(initial_tensor("norm.weight", torch.Size((5,)), seed=0, std=0.1, layers=1), torch.ones(5))
    assert torch.equal(initial_tensor("decoder.bias", torch.Size((5,)), seed=0, std=0.1, layers=1), torch.zeros(5))


@pytest.mark.parametrize(("family", "construct"), [("decoder", decoder.construct), ("encoder", encoder.construct)])
def test_rotary_frequencies_are_those_of_an_ordinarily_built_model(family: str, construct: Any) -> None:
    config = architecture(family, rope_theta=5000.0)
    with torch.random.fork_rng():
        ordinary = dict(construct(config).named_buffers())
    ours = dict(build(config, seed=0).named_buffers())
    assert ours.keys() == ordinary.keys()
    assert all(torch.equal(ours[name], ordinary[name]) for name in ours)
    frequencies = next(buffer for name, buffer in ours.items() if name.endswith("inv_freq"))
    assert frequencies[1].item() == pytest.approx(5000.0 ** (-2 / 8))


def test_a_decoder_sees_no_later_token() -> None:
    model = build(architecture("decoder"), seed=0)
    tokens, changed = _two_texts(position=9)
    with torch.no_grad():
        before, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_an_encoder_sees_both_sides() -> None:
    model = build(architecture("encoder"), seed=0)
    tokens, changed = _two_texts(position=9)
    with torch.no_grad():
        difference = (model(input_ids=tokens).logits - model(input_ids=changed).logits).abs().amax(-1)[0]
    assert (difference > 0).all()


def test_an_encoder_of_local_layers_sees_as_far_as_its_windows() -> None:
    config = architecture("encoder", layers=2, global_every=2, local_window=4)
    assert encoder.layout(config).layer_types == ["full_attention", "sliding_attention"]
    local = build(config, seed=0)
    local.model.layers = local.model.layers[1:]
    tokens, changed = _two_texts(position=9)
    with torch.no_grad():
        difference = (local(input_ids=tokens).logits - local(input_ids=changed).logits).abs().amax(-1)[0]
    assert difference.nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


def test_grouped_key_heads_are_smaller() -> None:
    model = build(architecture("decoder", kv_heads=2), seed=0)
    attention = model.model.layers[0].self_attn
    assert tuple(attention.k_proj.weight.shape) == (16, 32)
    assert tuple(attention.q_proj.weight.shape) == (32, 32)


def _matrix(family: str) -> str:
    return "up_proj.weight" if family == "decoder" else "Wi.weight"


def _two_texts(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(16)[None] * 5 % 97 + 4
    changed = tokens.clone()
    changed[0, position] = 50
    return tokens, changed
