"""A Llama with a quantized cache: streams equal batches, generation uses it, cache operations keep rows apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import kvquant
from models.compression.kvquant import Config
from models.compression.modules import quantized_cache
from models.compression.modules.quantized_cache import QuantizedCache, QuantizedLayer, Tables

IDS = {"bos_id": 60, "eos_id": 61, "pad_id": 62, "mask_id": 63}
HEADS, SIZE = 2, 16


def llama(**options: Any) -> PreTrainedModel:
    """A small Llama with grouped queries."""
    shape = {"width": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_width": 96, "init_std": 0.2} | options
    return build(ArchitectureConfig(vocab_size=64, max_positions=64, **IDS, **shape), seed=0).eval()


def tables(config: Config, layers: int = 3, channels: int = HEADS * SIZE, spread: float = 1.0) -> list[Tables]:
    """Tables fitted on noise."""
    generator = torch.Generator().manual_seed(0)
    x, w = spread * torch.randn(400, channels, generator=generator), torch.ones(400, channels)
    fitted = kvquant.Method().fit_keys(x, w, config), kvquant.Method().fit_values(x, w, config)
    return [Tables(*fitted, config.exact_tokens) for _ in range(layers)]


def quantized(config: Config | None = None) -> Any:
    return quantized_cache.attach(llama(), tables(config or Config()))


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def states(seed: int, batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, length, SIZE, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "config", [Config(bits=3), Config(bits=2, exact_tokens=4), Config(keys="token", exact_tokens=0)]
)
def test_a_stream_token_by_token_is_stored_as_the_batch_is(config: Config) -> None:
    key, value = states(0)
    batch, stream = (QuantizedLayer(tables(config)[0]) for _ in range(2))
    whole = batch.update(key, value)
    for place in range(key.shape[2]):
        last = stream.update(key[:, :, place : place + 1], value[:, :, place : place + 1])
    assert all(torch.equal(one, other) for one, other in zip(whole, last, strict=True))
    assert batch.stored_bytes == stream.stored_bytes
    assert batch.get_seq_length() == stream.get_seq_length() == 7


def test_the_first_tokens_are_exact_and_the_others_are_not() -> None:
    key, value = states(0)
    keys, values = QuantizedLayer(tables(Config(bits=2, exact_tokens=3, outliers=0.0))[0]).update(key, value)
    for decoded, original in ((keys, key), (values, value)):
        assert torch.equal(decoded[:, :, :3], original[:, :, :3].half().float())
        assert not torch.isclose(decoded[:, :, 3:], original[:, :, 3:], atol=1e-4).all(dim=-1).any()


@pytest.mark.parametrize("exact", [0, 2, 5])
def test_reordering_repeating_and_cropping_act_on_whole_sequences(exact: int) -> None:
    key, value = states(0)
    table = tables(Config(exact_tokens=exact))[0]

    def after(change: Any) -> Tensor:
        layer = QuantizedLayer(table)
        layer.update(key, value)
        change(layer)
        more = states(1, batch=layer._batch, length=2)
        return layer.update(*more)[0][:, :, :-2]

    plain = QuantizedLayer(table).update(key, value)[0]
    assert torch.equal(after(lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))), plain[[2, 0, 0]])
    assert torch.equal(after(lambda c: c.batch_select_indices(torch.tensor([1]))), plain[[1]])
    assert torch.equal(after(lambda c: c.batch_repeat_interleave(2)), plain.repeat_interleave(2, 0))
    assert torch.equal(after(lambda c: c.crop(-3)), plain[:, :, :4])
    with pytest.raises(ValueError, match="negative"):
        after(lambda c: c.crop(3))


def test_a_reset_cache_is_empty_and_usable() -> None:
    model = quantized()
    cache = model.new_cache()
    first = model(tokens(), past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stored_bytes == 0
    assert torch.equal(model(tokens(), past_key_values=cache).logits, first)


@torch.no_grad()
def test_the_cached_prefix_is_scored_as_a_pass_without_a_cache_scores_it() -> None:
    model, ids = quantized(), tokens()
    plain = model(ids, use_cache=False).logits
    assert torch.allclose(model(ids, use_cache=True).logits, plain, atol=1e-5)
    cache = model.new_cache()
    steps = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(ids.shape[1])]
    assert torch.allclose(torch.cat(steps, 1), plain, atol=2e-5)


@torch.no_grad()
def test_quantization_shows_and_vanishes_when_all_tokens_are_exact() -> None:
    ids = tokens()
    original = llama()(ids).logits
    assert float((quantized(Config(bits=2))(ids).logits - original).abs().max()) > 0.05
    exact = quantized(Config(bits=2, exact_tokens=64))(ids, use_cache=False).logits
    assert float((exact - original).abs().max()) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_makes_and_uses_the_quantized_cache(options: dict[str, Any]) -> None:
    model, ids = quantized(), tokens(length=6)
    torch.manual_seed(0)
    made = model.generate(
        ids,
        max_new_tokens=8,
        min_new_tokens=8,
        use_cache=True,
        return_dict_in_generate=True,
        pad_token_id=62,
        **options,
    )
    assert isinstance(made.past_key_values, QuantizedCache)
    if not options:
        text = ids
        for _ in range(8):
            scores = model(text, use_cache=False).logits[:, -1]
            scores[:, IDS["eos_id"]] = -torch.inf
            text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
        assert torch.equal(made.sequences, text)


@torch.no_grad()
def test_positions_of_padded_sequences_are_their_own() -> None:
    """With nothing kept exactly, a prompt behind padding continues as the prompt alone does."""
    model, ids = quantized(Config(exact_tokens=0)), tokens(batch=1, length=6)
    padded = torch.cat([torch.full((1, 4), 62), ids], 1)
    mask = (padded != 62).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "use_cache": True, "pad_token_id": 62, "do_sample": False}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], alone)


@torch.no_grad()
def test_the_cache_takes_a_fraction_of_the_bytes_of_a_plain_one() -> None:
    ids = tokens(batch=2, length=60)
    plain = llama()(ids, use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    model = quantized(Config(bits=3, outliers=0.01))
    stored = model(ids, use_cache=True).past_key_values.stored_bytes
    assert size == 3 * 2 * 2 * 60 * 32 * 4
    assert 3 / 32 < stored / size < 0.35, "2 and 4 bytes of counts and ranges weigh much at 32 channels"


def test_other_models_and_foreign_caches_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ModernBertForMaskedLM is another family"):
        quantized_cache.attach(llama(family="encoder", kv_heads=None), [])
    with pytest.raises(TypeError, match="new_cache"):
        quantized()(tokens(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="shorter"):
        quantized_cache.attach(llama(), tables(Config(), layers=2))


def test_attaching_changes_no_weight() -> None:
    before = llama().state_dict()
    model = quantized()
    assert isinstance(model, LlamaForCausalLM)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
