"""Codes, codebooks and rows of KVQuant against slow statements of the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.compression import kvquant
from models.compression.formats import cache_codes
from models.compression.formats.cache_codes import Codebook, Quantizer, Rows
from models.compression.kvquant import Config


def data(rows: int = 300, channels: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with uneven channels and heavy tails, and weights."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(channels, generator=generator))
    x = torch.randn(rows, channels, generator=generator) * scale + torch.randn(channels, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.01] *= 6
    return x, torch.rand(rows, channels, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_codes_come_back_and_fill_every_bit(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 24), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = cache_codes.pack(codes, bits)
    assert packed.shape == (5, 24 * bits // 8)
    assert torch.equal(cache_codes.unpack(packed, bits, 24), codes)
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes[0].tolist())
    assert packed[0].tolist() == [int(text[place : place + 8][::-1], 2) for place in range(0, len(text), 8)]


def test_codes_that_leave_a_byte_unfilled_are_refused() -> None:
    with pytest.raises(ValueError, match="5 codes of 3 bits do not fill whole bytes"):
        cache_codes.pack(torch.zeros(1, 5, dtype=torch.uint8), 3)


def test_encoding_finds_the_nearest_level() -> None:
    book = cache_codes.uniform(3)
    unit = torch.linspace(-1, 1, 101)
    nearest = (unit.unsqueeze(1) - book.levels_L).abs().amin(1)
    assert torch.allclose((book.decode(book.encode(unit)) - unit).abs(), nearest, atol=1e-7)


def weighted_error(levels: Any, x: Tensor, w: Tensor) -> float:
    """Weighted squared error of rounding to the nearest level."""
    distance = (x.unsqueeze(1) - torch.as_tensor(levels, dtype=torch.float64)).square().amin(1)
    return float((w * distance).sum())


def test_k_means_is_as_good_as_the_best_split_of_all() -> None:
    """With two bits and ten points, every split into four runs can be tried; Lloyd ends at most 5 % above the best."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(10, generator=generator) * 2 - 1).double().sort().values
    w = torch.rand(10, generator=generator).double()
    best = min(
        weighted_error(
            [float((x[a:b] * w[a:b]).sum() / w[a:b].sum()) for a, b in itertools.pairwise((0, *cut, 10))], x, w
        )
        for cut in itertools.combinations(range(1, 10), 3)
    )
    found = kvquant.k_means(x.float(), w.float(), 2)
    assert weighted_error(found.levels_L.double(), x, w) <= 1.05 * best + 1e-12


def test_k_means_stands_still_at_weighted_means_of_its_cells() -> None:
    x, w = data(400)
    unit = (x / x.abs().max()).flatten()
    book = kvquant.k_means(unit, w, 3)
    codes = book.encode(unit)
    for code, level in enumerate(book.levels_L):
        cell = codes == code
        mean = (unit[cell] * w.flatten()[cell]).sum() / w.flatten()[cell].sum()
        assert float(level) == pytest.approx(float(mean), abs=2e-3)


def test_k_means_serves_heavy_entries_first_and_survives_weights_of_zero() -> None:
    x = torch.tensor([-1.0, -0.9, -0.8, -0.7, 0.5, 0.6, 0.7, 0.8])
    w = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-9, 1e-9, 1e-9, 1e-9])
    assert weighted_error(kvquant.k_means(x, w, 2).levels_L, x.double(), w.double()) < 1e-6
    assert torch.equal(kvquant.k_means(x, torch.zeros(8), 2).levels_L, kvquant.k_means(x, torch.ones(8), 2).levels_L)


def test_q_norm_restores_mean_and_deviation_without_changing_a_code() -> None:
    x, w = data()
    unit = (x / x.abs().max()).flatten()
    plain = kvquant.k_means(unit, w, 2)
    stretched = kvquant.q_norm(plain, unit)
    decoded = stretched.decode(stretched.encode(unit))
    assert torch.equal(stretched.encode(unit), plain.encode(unit))
    assert float(decoded.mean()) == pytest.approx(float(unit.mean()), abs=1e-6)
    assert float(decoded.std()) == pytest.approx(float(unit.std()), rel=1e-5)
    assert float(plain.decode(plain.encode(unit)).std()) < 0.99 * float(unit.std())


def slow_values(x_NC: Tensor, book: Codebook, share: float) -> Tensor:
    """Per-token coding, one entry at a time."""
    result = x_NC.clone()
    for row, entries in enumerate(x_NC):
        count = round(share * len(entries) / 2)
        order = sorted(range(len(entries)), key=lambda place: float(entries[place]))
        dense = order[count : len(order) - count]
        low, high = (float(entries[place].half()) for place in (dense[0], dense[-1]))
        for place in range(len(entries)):
            if place in dense:
                unit = (float(entries[place]) - (high + low) / 2) / ((high - low) / 2)
                near = min(book.levels_L.tolist(), key=lambda level: abs(level - min(max(unit, -1), 1)))
                result[row, place] = near * (high - low) / 2 + (high + low) / 2
            else:
                result[row, place] = entries[place].half()
    return result


@pytest.mark.parametrize("share", [0.0, 0.15, 0.2])
def test_values_are_coded_per_token_as_the_slow_statement_says(share: float) -> None:
    x, _ = data(20)
    quantizer = Quantizer(3, cache_codes.uniform(3), share)
    assert torch.allclose(
        quantizer.decode(quantizer.encode(x)), slow_values(x, cache_codes.uniform(3), share), atol=1e-5
    )


@pytest.mark.parametrize("share", [0.01, 0.03])
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_short_rows_keep_the_share_of_outliers_that_was_asked_for(channels: int, share: float) -> None:
    """One entry at either end of every row would be 1.6 % of 128 channels and 12.5 % of 16."""
    x, w = data(2000, channels)
    other = data(2000, channels, seed=1)[0] * 3
    quantizer = kvquant.Method().fit_values(x, w, Config(bits=3, outliers=share))
    assert len(quantizer.encode(x).values_S) == pytest.approx(share * x.numel(), rel=0.2 if channels > 64 else 0.01)
    assert len(quantizer.encode(other).values_S) < 3 * share * other.numel(), "rows of another size"
    kept = quantizer.decode(quantizer.encode(x))
    plain = kvquant.Method().fit_values(x, w, Config(bits=3, outliers=0.0))
    error, without = (float((w * (y - x).square()).sum()) for y in (kept, plain.decode(plain.encode(x))))
    assert error < without


def test_keys_are_coded_per_channel_on_the_calibrated_range() -> None:
    x, w = data()
    quantizer = kvquant.Method().fit_keys(x, w, Config(bits=3, outliers=0.0, codebook="uniform"))
    assert quantizer.range_2C is not None
    assert torch.equal(quantizer.range_2C, torch.stack([x.amin(0), x.amax(0)]))
    step = (x.amax(0) - x.amin(0)) / 7
    assert bool(((quantizer.decode(quantizer.encode(x)) - x).abs() <= step / 2 + 1e-5).all())
    beyond = quantizer.decode(quantizer.encode(3 * x))
    assert bool((beyond <= x.amax(0) + 1e-5).all()), "without outliers, what lies beyond the range is clipped"


def test_the_outliers_of_keys_are_what_lies_beyond_the_range_and_stay_exact() -> None:
    x, w = data()
    quantizer = kvquant.Method().fit_keys(x, w, Config(bits=2, outliers=0.02))
    assert quantizer.range_2C is not None
    apart = (x < quantizer.range_2C[0]) | (x > quantizer.range_2C[1])
    assert 0.01 < float(apart.float().mean()) <= 0.03
    rows = quantizer.encode(x)
    assert rows.counts_N.tolist() == apart.sum(1).tolist()
    assert torch.equal(quantizer.decode(rows)[apart], x[apart].half().float())


def test_no_entry_lies_on_the_end_of_a_range_that_has_outliers_beyond() -> None:
    """Numbers that come back with another rounding fall on the same side."""
    x = torch.randint(-6, 7, (200, 8), generator=torch.Generator().manual_seed(0)).float()
    low, high = kvquant.channel_ranges(x, 0.1)
    apart = (x < low) | (x > high)
    assert bool(apart.any())
    for shift in (-1e-4, 1e-4):
        assert torch.equal((x + shift < low) | (x + shift > high), apart)
    low, high = kvquant.channel_ranges(x, 0.001)
    assert not bool(((x - 1e-4 < low) | (x + 1e-4 > high)).any()), "all ends are shared by many entries"
    assert torch.equal(kvquant.channel_ranges(x, 0.0), torch.stack([x.amin(0), x.amax(0)]))


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("bits", [2, 3])
def test_each_step_of_the_method_lowers_the_weighted_error(side: str, bits: Any) -> None:
    x, w = data(1500)
    method = kvquant.Method()
    fit = method.fit_keys if side == "keys" else method.fit_values

    def error(**options: Any) -> float:
        quantizer = fit(x, w, Config(bits=bits, q_norm=False, **options))
        return float((w * (quantizer.decode(quantizer.encode(x)) - x).square()).sum())

    plain = error(codebook="uniform", outliers=0.0)
    fitted = error(outliers=0.0)
    assert fitted < 0.95 * plain
    assert error(outliers=0.01) < 0.95 * fitted


@pytest.mark.parametrize(
    "config", [Config(bits=3), Config(bits=2, keys="token"), Config(bits=2, keys="token", outliers=0.0)]
)
def test_rows_are_coded_alone_so_a_stream_equals_the_batch(config: Config) -> None:
    x, w = data(40)
    quantizer = kvquant.Method().fit_keys(x, w, config)
    whole = quantizer.encode(x)
    stream = quantizer.encode(x[:0])
    for row in x:
        stream = Rows.joined(stream, quantizer.encode(row.unsqueeze(0)))
    for name, tensor in vars(whole).items():
        assert tensor is None or torch.equal(tensor, vars(stream)[name]), name


def test_picked_rows_are_those_rows() -> None:
    x, w = data(30)
    quantizer = kvquant.Method().fit_values(x, w, Config(bits=3, outliers=0.2))
    rows, index = quantizer.encode(x), torch.tensor([3, 3, 29, 0])
    assert torch.equal(quantizer.decode(rows.take(index)), quantizer.decode(rows)[index])
    assert rows.take(index[:0]).counts_N.numel() == 0


def test_stored_bytes_are_codes_ranges_and_outliers() -> None:
    x, w = data(100, 16)
    dense = kvquant.Method().fit_values(x, w, Config(bits=3, outliers=0.0)).encode(x)
    assert dense.bytes == 100 * (16 * 3 // 8 + 4 + 2)
    sparse = kvquant.Method().fit_values(x, w, Config(bits=3, outliers=0.2)).encode(x)
    assert sparse.bytes - dense.bytes == 4 * sparse.values_S.numel() == 4 * 100 * 4


def test_tables_survive_storage() -> None:
    x, w = data()
    for config in (Config(), Config(bits=2, keys="token")):
        quantizer = kvquant.Method().fit_keys(x, w, config)
        again = kvquant.Method().restore(quantizer.tensors(), config)
        assert torch.equal(again.decode(again.encode(x)), quantizer.decode(quantizer.encode(x)))


def test_a_vector_without_spread_and_numbers_beyond_float16_survive() -> None:
    flat = torch.full((4, 16), 2.5)
    quantizer = kvquant.Method().fit_values(flat, torch.ones(4, 16), Config(outliers=0.0))
    assert torch.equal(quantizer.decode(quantizer.encode(flat)), flat)
    assert bool(torch.isfinite(quantizer.decode(quantizer.encode(torch.full((1, 16), 1e9)))).all())


def test_what_cannot_work_is_refused() -> None:
    x, w = data(10, 12)
    with pytest.raises(ValueError, match="12 channels of 3 bits do not fill whole bytes"):
        kvquant.Method().fit_keys(x, w, Config(bits=3))
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        kvquant.Method().fit_values(x, w, Config(bits=2))
    with pytest.raises(ValidationError, match="'uniform' has none"):
        Config(codebook="uniform", q_norm=True)
    with pytest.raises(ValidationError, match="Input should be 2, 3 or 4"):
        Config(bits=8)  # type: ignore[arg-type]
