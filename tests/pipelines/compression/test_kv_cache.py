"""Cache tables on the bench: what each step of KVQuant buys, what is stored, and what is refused."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.architectures.config import IGNORED
from models.compression import kvquant
from models.compression.cache_method import CacheBaseline
from models.compression.formats.cache_codes import Rows, rounding, rounding_bytes
from models.compression.kvquant import Config
from models.compression.modules import quantized_cache
from models.compression.modules.quantized_cache import QuantizedCacheLlama, QuantizedLayer, Tables
from pipelines.compression import calibration, kv_cache, quick_eval
from pipelines.compression.calibration import Batch
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError, NumericError
from pipelines.modelio import kv_cache_file
from pipelines.modelio.folder import KV_CACHE_FILE, WeightReader
from pipelines.modelio.load import is_private, load_model, load_weights
from tests.pipelines.compression.conftest import text_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
TOKENS = slice(0, 8)


@pytest.fixture(scope="module")
def seen(bench: Any) -> Any:
    """Keys and values of the bench model over calibration sequences."""
    tokens = calibration.sample_tokens(bench.prepare.path, samples=48, seed=0, masked=False)
    return kv_cache.record(load_weights(bench.parent.path / "model"), text_of(bench.prepare, tokens), skip=1)


@pytest.fixture(scope="module")
def measure(bench: Any, seen: Any) -> Callable[..., tuple[float, float]]:
    """Return a function from parameters to (perplexity over the parent's, stored bytes a token)."""
    from models.compression import kvquant

    source = bench.parent.path / "model"
    base = bench.loss(load_weights(source))

    @functools.cache
    def go(**options: Any) -> tuple[float, float]:
        config = Config(**options)
        made = [
            Tables(
                kvquant.Method().fit_keys(k.x_NC, k.fisher_NC, config),
                kvquant.Method().fit_values(v.x_NC, v.fisher_NC, config),
                1,
            )
            for k, v in seen
        ]
        model = quantized_cache.attach(load_weights(source), made)
        store, ids = model.new_cache(), bench.held_BT[TOKENS]
        with torch.no_grad():
            model(ids, past_key_values=store)
        return math.exp(bench.loss(model) - base), store.stored_bytes / ids.numel()

    return go


@pytest.mark.parametrize("bits", [3, 2])
def test_each_step_of_the_method_brings_the_model_closer_to_its_parent(bits: int, measure: Any) -> None:
    """Ratios of perplexity at 2 bits when this was written: 1.114 per channel, 1.074 with everything but Q-Norm.

    On a model trained four times shorter: 1.155 per token, 1.102 per channel, 1.072 fitted, 1.046 sparse. Weighting the
    codebook by squared gradients is no step: it does not help (figures in `models.compression.kvquant`).
    """
    per_token, size_token = measure(bits=bits, keys="token", codebook="uniform", outliers=0.0)
    per_channel, size = measure(bits=bits, codebook="uniform", outliers=0.0)
    fitted, size_fitted = measure(bits=bits, outliers=0.0, q_norm=False)
    sparse, size_sparse = measure(bits=bits, q_norm=False)
    assert max(fitted, per_channel) < per_token
    if bits == 2:
        # At 3 bits the codebook and the outliers are not told from noise. Per channel, fitted, with outliers on two
        # bench models, the same recipe on two machines: 1.0139, 1.0106, 1.0110 and 1.0120, 1.0126, not measured.
        assert 1.0 < sparse < fitted < per_channel
        assert sparse - 1 < 0.75 * (per_channel - 1)
    assert size == size_fitted < size_token, "ranges of channels are stored once"
    assert size < size_sparse < 1.25 * size


def test_the_stored_cache_is_a_small_part_of_a_plain_one(bench: Any, measure: Any) -> None:
    model = load_weights(bench.parent.path / "model")
    with torch.no_grad():
        plain = model(bench.held_BT[TOKENS], use_cache=True).past_key_values
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers) / bench.held_BT[TOKENS].numel()
    for bits, share in ((3, 0.25), (2, 0.19)):
        _, size = measure(bits=bits)
        assert bits / 16 < 2 * size / full < share, f"{bits} bits: {size:.0f} of {full:.0f} bytes a token in float32"


def test_recorded_keys_are_those_before_rope_and_gradients_are_those_of_the_loss(bench: Any) -> None:
    model = load_weights(bench.parent.path / "model")
    tokens = calibration.sample_tokens(bench.prepare.path, samples=2, seed=0, masked=False)
    after = np.concatenate([tokens[:, 1:], np.full((2, 1), IGNORED)], axis=1)
    keys, values = kv_cache.record(model, [Batch(tokens, after)], skip=0)[0]
    ids = torch.from_numpy(tokens)
    states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    assert torch.allclose(keys.x_NC, model.model.layers[0].self_attn.k_proj(states).flatten(0, 1), atol=1e-5)
    assert values.x_NC.shape == values.fisher_NC.shape == (ids.numel(), 128)
    place = int(values.fisher_NC.flatten().argmax())
    step = 1e-2 * torch.nn.functional.one_hot(torch.tensor(place), values.x_NC.numel()).float()

    def loss(sign: int) -> float:
        shift = (sign * step).view(*ids.shape, -1)
        hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _m, _i, out: out + shift)
        try:
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).double()
            return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        finally:
            hook.remove()

    slope = (loss(1) - loss(-1)) / 2e-2
    assert slope**2 == pytest.approx(float(values.fisher_NC.flatten()[place]), rel=0.02)


def test_a_child_is_the_parent_with_tables_and_loads_with_its_cache(
    bench: Any, compress: Callable[..., Any], measure: Any
) -> None:
    child, report = compress(bench, {"method": "kvquant", "bits": 3, "samples": 48})
    source, folder = bench.parent.path / "model", child / "model"
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert held.keys() - {KV_CACHE_FILE} == {path.name for path in source.iterdir()}
    assert all(held[path.name] == path.read_bytes() for path in source.iterdir())
    assert WeightReader(folder).names() == WeightReader(source).names()
    assert is_private(folder)
    model = load_model(folder)
    assert isinstance(model, QuantizedCacheLlama)
    ratio, size = measure(bits=3)
    assert bench.loss(model) - bench.loss(load_weights(source)) == pytest.approx(math.log(ratio), abs=1e-5)
    # The measured size has the exact first token and the positions too.
    assert report["totals"]["bits_per_cached_number"] == pytest.approx(8 * size / (3 * 2 * 128), rel=0.08)
    assert report["totals"]["table_bytes"] == (folder / KV_CACHE_FILE).stat().st_size < 20_000
    for side in ("keys", "values"):
        assert report["errors"][side] < report["errors"]["baselines"]["uniform"][side]
    assert report["errors"]["keys"] < report["errors"]["baselines"]["per token"]["keys"]


def test_two_runs_write_the_same_bytes(small: Any, compress: Callable[..., Any]) -> None:
    once, again = (compress(small(), {"method": "kvquant", "samples": 8})[0] for _ in range(2))
    for name in (f"model/{KV_CACHE_FILE}", "compression.json"):
        assert (once / name).read_bytes() == (again / name).read_bytes()


def publish(folder: Path) -> Artifact:
    return artifact.publish(
        folder, folder.with_name(f"{folder.name}-out"), stage="c", node="c", identity={}, parents={}, summary={}
    )


def test_the_cache_of_a_quantized_child_is_quantized_after_it(small: Any, compress: Callable[..., Any]) -> None:
    first, before = compress(small(), {"method": "rtn", "bits": 4})
    chained, report = compress(small(), {"method": "kvquant", "samples": 8}, parent=publish(first))
    assert report["totals"]["bits_per_weight"] == before["totals"]["bits_per_weight"]
    model = load_model(chained / "model")
    made = model.generate(torch.arange(9).unsqueeze(0), max_new_tokens=3, use_cache=True, pad_token_id=258)
    assert made.shape[1] == 12


def test_what_codes_its_cache_already_is_no_parent(small: Any, compress: Callable[..., Any]) -> None:
    child, _ = compress(small(), {"method": "kvquant", "samples": 8})
    parent = publish(child)
    for method in ("kvquant", "rtn"):
        with pytest.raises(ConfigError, match=rf"{method}: its base quantizes its cache already"):
            compress(small(), {"method": method}, parent=parent)


def test_an_encoder_is_refused_by_name(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"kvquant quantizes .* ModernBertForMaskedLM has none"):
        compress(small(family="encoder"), {"method": "kvquant"})


def test_channels_that_do_not_fill_bytes_are_refused_by_number(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="20 channels of 3 bits"):
        compress(small(width=20), {"method": "kvquant", "samples": 4})


def test_damaged_or_foreign_tables_are_an_integrity_error(small: Any, compress: Callable[..., Any]) -> None:
    folder = compress(small(), {"method": "kvquant", "samples": 4})[0] / "model"
    path = folder / KV_CACHE_FILE
    with pytest.raises(IntegrityError, match=re.escape("is for 2 layers; the model beside it has 5")):
        kv_cache_file.read(folder, 5)
    kept = {name: tensor for name, tensor in load_file(path).items() if ".1." not in name}
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:40])
    with pytest.raises(IntegrityError, match="damaged"):
        load_model(folder)
    save_file(kept, path)
    with pytest.raises(IntegrityError, match="is for 1 layers"):
        load_model(folder)
    path.write_bytes(whole)
    tables = load_file(path)
    tables["layers.1.values.levels"][0] = torch.inf
    save_file(tables, path, metadata={"coding": "{}"})
    with pytest.raises(NumericError, match=r"layers\.1\.values\.levels"):
        load_model(folder)
    path.write_bytes(whole)
    save_file(load_file(path), path)
    with pytest.raises(IntegrityError, match="does not say how it was quantized"):
        load_model(folder)


# ---- baselines ---------------------------------------------------------------------------------------------------

WIDTH = 128


def noise(rows: int = 50, width: int = WIDTH) -> Tensor:
    """Rows whose channels differ in size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator) * torch.linspace(0.1, 4.0, width)


@pytest.mark.parametrize(("bits", "group"), [(2, 0), (3, 64), (3, 16), (4, 32), (5, 8), (8, 0)])
def test_rounding_is_that_of_every_group_by_itself_at_the_counted_bytes(bits: int, group: int) -> None:
    """Against a loop over tokens and groups."""
    x_NC = noise()
    quantizer = rounding(bits, group)
    rows = quantizer.encode(x_NC)
    assert rows.bytes == len(x_NC) * (rounding_bytes(WIDTH, bits, group) or 0)
    decoded = quantizer.decode(rows)
    for token, got in zip(x_NC, decoded, strict=True):
        for part, found in zip(token.split(group or WIDTH), got.split(group or WIDTH), strict=True):
            low, high = part.min().half().float(), part.max().half().float()
            step = (high - low) / (2**bits - 1)
            expected = low + step * ((part - low) / step).round().clamp(0, 2**bits - 1)
            far = (found - expected).abs() > 1e-5
            # An entry halfway between two levels may go to either.
            assert bool(((found - part).abs()[far] - step / 2 < 1e-4).all())
            assert int(far.sum()) <= 1


def test_rows_with_groups_are_picked_and_joined_as_they_were_coded() -> None:
    x_NC = noise(12)
    quantizer = rounding(3, 16)
    whole = quantizer.encode(x_NC)
    index = torch.tensor([7, 0, 7, 11])
    assert torch.equal(quantizer.decode(whole.take(index)), quantizer.decode(quantizer.encode(x_NC[index])))
    halves = Rows.joined(quantizer.encode(x_NC[:5]), quantizer.encode(x_NC[5:]))
    assert torch.equal(quantizer.decode(halves), quantizer.decode(whole))
    assert halves.bytes == whole.bytes


def test_groups_that_do_not_divide_a_row_have_no_size() -> None:
    assert rounding_bytes(96, 3, 64) is None
    assert rounding_bytes(20, 3, 0) is None, "20 codes of 3 bits do not fill whole bytes"
    assert rounding_bytes(96, 3, 32) == 36 + 2 + 12


@pytest.mark.parametrize("coded", [70.0, 101.0, 117.1, 150.0, 260.0])
def test_the_rounding_baseline_is_the_smallest_that_is_not_smaller(coded: float) -> None:
    """Two layers of keys and values; against every grid, one by one."""
    child = [Tables(rounding(3, 0), rounding(3, 0), 5) for _ in range(2)]
    made = kv_cache.nearest_rounding(child, WIDTH, 2 * coded)
    size = sum(side.encode(noise(1)).bytes for table in made for side in (table.keys, table.values))
    every = [
        4 * found
        for bits in range(2, 9)
        for group in (0, 128, 64, 32, 16, 8)
        if (found := rounding_bytes(WIDTH, bits, group)) is not None
    ]
    assert size == min(s for s in every if s >= 2 * coded)
    assert {table.exact_tokens for table in made} == {5}


def test_a_variant_larger_than_every_grid_meets_the_largest() -> None:
    child = [Tables(rounding(3, 0), rounding(3, 0), 1)]
    (made,) = kv_cache.nearest_rounding(child, WIDTH, 1e9)
    assert (made.keys.bits, made.keys.group) == (8, 8)


@pytest.mark.parametrize("samples", [3, 6])
def test_rotated_keys_are_those_that_attention_sees(samples: int, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a passing batch and of one that is thinned; transformers rotates the reference."""
    bench = small()
    monkeypatch.setattr(kv_cache, "_ROWS", 300)
    model = load_weights(bench.parent.path / "model")
    tokens = calibration.sample_tokens(bench.prepare.path, samples=samples, seed=0, masked=False)
    keys, values = kv_cache.record(model, text_of(bench.prepare, tokens), skip=2)[1]
    thin = -(-tokens.size // 300)
    assert len(keys.x_NC) == len(keys.positions_N) == len(values.x_NC)
    turned = keys.rotated(model)
    heads = model.config.num_key_value_heads
    for row in range(0, len(keys.x_NC), 7):
        place = keys.positions_N[row].view(1, 1)
        key = keys.x_NC[row].view(1, heads, 1, -1)
        expected, _ = apply_rotary_pos_emb(key, key, *model.model.rotary_emb(key, place))
        assert torch.allclose(turned.x_NC[row], expected.flatten(), atol=1e-6)
    first = torch.arange(2, tokens.shape[1]).repeat(min(samples, 4))[::thin]
    assert torch.equal(keys.positions_N[: len(first)], first)
    # A rotation keeps lengths, of a gradient too.
    assert torch.allclose(turned.gradient_NC.norm(dim=1), keys.gradient_NC.norm(dim=1), rtol=1e-4, atol=1e-8)
    assert not torch.allclose(turned.gradient_NC, keys.gradient_NC)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_cache_that_rounds_nearly_nothing_computes_what_the_parent_does(rotated: bool, small: Any) -> None:
    """Eight bits in groups of eight, before or after RoPE; as one pass, and token by token."""
    bench = small()
    source = bench.parent.path / "model"
    tables = [Tables(rounding(8, 8), rounding(8, 8), 1, rotated) for _ in range(2)]
    model = quantized_cache.attach(load_weights(source), tables)
    ids = bench.held_BT[:2, :20]
    with torch.no_grad():
        plain, once = (m(input_ids=ids).logits for m in (load_weights(source), model))
        store = model.new_cache()
        stream = [model(input_ids=ids[:, t : t + 1], past_key_values=store).logits for t in range(ids.shape[1])]
    rounded, paths = (float(d.square().mean().sqrt()) for d in (once - plain, torch.cat(stream, 1) - once))
    assert 0 < rounded < 0.01 * float(plain.std())
    # Sums in another order move an entry over the edge of a code here and there.
    assert paths < 0.2 * rounded


def test_a_layer_on_its_device_still_knows_whether_keys_come_rotated() -> None:
    layer = QuantizedLayer(Tables(rounding(8, 8), rounding(8, 8), 0, rotated=True))
    layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    assert layer._tables.rotated


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ({}, {"uniform", "per token", "after RoPE"}),
        ({"codebook": "uniform"}, {"per token", "after RoPE"}),
        ({"keys": "token"}, {"uniform", "per token"}),
        ({"keys": "token", "codebook": "uniform", "q_norm": False}, set()),
    ],
)
def test_a_baseline_that_would_be_the_variant_itself_is_left_out(table: dict[str, Any], names: set[str]) -> None:
    parameters = Config.model_validate({"q_norm": False} | table)
    assert kvquant.Method().baselines(parameters).keys() == names


def test_without_validation_documents_nothing_is_compared(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), {"method": "kvquant", "samples": 4, "baseline_documents": 4})
    assert "comparison" not in report


@pytest.mark.slow
def test_a_run_measures_the_variant_beside_its_baselines_through_the_cache(
    bench: Any, compress: Callable[..., Any]
) -> None:
    """At 2 bits every baseline is worse than the variant beyond the documents' noise, and rounding has more bytes.

    Ratios of bits per byte when this was written, on 12 documents: kvquant 1.024, rounding 1.040 with 1.15 of the
    bytes, uniform 1.044, per token 1.048, after RoPE 1.054. At 3 bits only after RoPE was: 1.0057, 1.0069 with 1.11 of
    the bytes, 1.0058, 1.0084, 1.0096.
    """
    _, report = compress(bench, {"method": "kvquant", "bits": 2, "baseline_documents": 8})
    compared = report["comparison"]
    mine, others = compared["variant"], compared["baselines"]
    assert set(others) == {"rtn", "uniform", "per token", "after RoPE"}
    size = mine["cache_bytes_per_token"]
    assert size <= others["rtn"]["cache_bytes_per_token"] < 1.3 * size
    for name in ("uniform", "after RoPE"):
        assert others[name]["cache_bytes_per_token"] == pytest.approx(size, rel=0.03)
    assert mine["ratio"]["low"] > 1, "it rounds"
    assert mine["versus_variant"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for name, row in others.items():
        assert row["versus_variant"]["low"] > 1, name
    assert (compared["split"], compared["items"]) == ("validation", 8)
    assert "no later row" in compared["left_out"]["gptq"]


@pytest.mark.slow
def test_the_measured_variant_is_the_one_that_is_stored(bench: Any, compress: Callable[..., Any]) -> None:
    """Loaded again, it gives the same nats on the same documents; a baseline's tables do not."""
    folder, report = compress(bench, {"method": "kvquant", "bits": 2, "samples": 16, "baseline_documents": 4})
    text = quick_eval.build(bench.prepare.path, 4, "decoder", torch.device("cpu"), end="first")
    assert text is not None
    base = text.nats(load_weights(bench.parent.path / "model"), "base")
    mine = text.nats(load_model(folder / "model"), "variant")
    ratio, compared = float(mine.sum() / base.sum()), report["comparison"]
    assert ratio == pytest.approx(compared["variant"]["ratio"]["value"], rel=1e-6)
    assert ratio != pytest.approx(compared["baselines"]["uniform"]["ratio"]["value"], rel=1e-4)


def test_tables_of_a_baseline_keep_everything_else(small: Any) -> None:
    """Only what the baseline is about differs from the variant's tables."""
    bench = small()
    model = load_weights(bench.parent.path / "model")
    tokens = calibration.sample_tokens(bench.prepare.path, samples=4, seed=0, masked=False)
    keys, values = kv_cache.record(model, text_of(bench.prepare, tokens), skip=1)[0]
    config = Config()
    child = kv_cache.fit(kvquant.Method(), keys, values, CacheBaseline(config))
    after = kv_cache.fit(kvquant.Method(), keys.rotated(model), values, CacheBaseline(config, after_rope=True))
    assert torch.equal(child.values.codebook.levels_L, after.values.codebook.levels_L)
    assert child.keys.range_2C is not None
    assert after.keys.range_2C is not None
    assert not torch.allclose(child.keys.range_2C, after.keys.range_2C)
    assert replace(child, keys=after.keys, values=after.values, rotated=True) == after
