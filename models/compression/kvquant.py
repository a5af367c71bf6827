"""KVQuant: keys and values of the attention cache in 2 to 4 bits.

Keys are stored per channel and before the rotation of RoPE, on ranges found in calibration; values per token, on the
range of that token. Every vector is brought to [-1, 1] and coded by one codebook of 2^b levels for each layer and side
(keys, values): one-dimensional k-means or a uniform grid. A small share of entries at
both ends is kept exactly, in float16 with its place ("dense and sparse"), and so are the first tokens, which attention
leans on. Of a token's values the paper keeps so many at either end; where that is less than one (below 200 channels at
1 %), those that lie farthest from the middle of their row are kept, by a threshold that on average leaves the share
that was asked for. Where 2 bits shrink the spread, the levels are stretched so that mean and deviation are those of the
data (Q-Norm).

K-means weights an entry by the square of its half range, because that is what an error in the unit interval is worth
in the cache. The paper weights by the squared gradient instead; `fisher` multiplies both. It is off by default, because
it did not help where it was measured: the bench of the tests, 24 validation documents, three draws of 64 calibration
sequences, perplexity over the base's with gradients and without: 1.049, 1.050, 1.052 against 1.040, 1.035, 1.039 at
2 bits; 1.007, 1.011, 1.009 against 1.010, 1.009, 1.011 at 3; 1.003 thrice against 1.002 thrice at 4. The paper's weight
alone varied most (1.042 to 1.058 at 2 bits); without outliers it was the best (1.068 to 1.071 against 1.076 to 1.078).

The rows are stored as in `formats.cache_codes`; the cache that holds them is `modules.quantized_cache`.

Shapes: N rows (tokens of all sequences), C channels (all key heads side by side), L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.compression.base import Calibration
from models.compression.cache_method import CacheBaseline, CacheConfig, CacheMethod
from models.compression.formats.cache_codes import (
    Codebook,
    Quantizer,
    dense_range,
    distances,
    extremes,
    threshold_of,
    to_unit,
    uniform,
)
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


_SAME = 1e-4
"""Entries nearer than this share of a channel's spread may be one number, rounded in two ways."""
_ROUNDS = 60
"""Lloyd iterations; on the calibration samples of the tests the codebook stands still after 20 to 40."""


class Config(CacheConfig):
    """Parameters of KVQuant."""

    bits: Literal[2, 3, 4] = Field(3, description="bits of one cached number")
    keys: Literal["channel", "token"] = Field("channel", description="what shares a range among the keys")
    codebook: Literal["nuq", "uniform"] = Field("nuq", description="levels by k-means on calibration data, or evenly")
    fisher: bool = Field(False, description="weight k-means by squared gradients too; see the measurements above")
    outliers: float = Field(
        0.01, ge=0.0, le=0.2, description="share of entries kept in float16, half of it at either end of a range"
    )
    q_norm: bool | None = Field(None, description="stretch the levels to the data's deviation; none: only at 2 bits")

    @property
    def label(self) -> str:
        """For instance `3bit`, `2bit-uniform`, `3bit-token`."""
        parts = [f"{self.bits}bit", *(["token"] if self.keys == "token" else [])]
        return "-".join([*parts, *(["uniform"] if self.codebook == "uniform" else [])])

    @property
    def stretches(self) -> bool:
        """Whether Q-Norm is applied."""
        return self.bits == 2 if self.q_norm is None else self.q_norm

    @model_validator(mode="after")
    def _has_use(self) -> Self:
        if self.codebook == "uniform" and self.q_norm:
            raise ValueError("q_norm = true stretches a fitted codebook; codebook = 'uniform' has none")
        return self


# ---- codebooks --------------------------------------------------------------------------------------------------


def k_means(unit: Tensor, weight: Tensor, bits: int) -> Codebook:
    """Return the codebook with the least weighted squared error that Lloyd's iterations find.

    They start from weighted quantiles, so the result is a function of the data alone. Sorting once turns each round
    into look-ups in running sums: a million entries take a second.

    Args:
        unit: entries in [-1, 1], any shape.
        weight: what a squared error of each entry counts.
        bits: 2^bits levels.
    """
    order = torch.argsort(unit.flatten(), stable=True)
    x, w = unit.flatten()[order].double(), weight.flatten()[order].double().clamp(min=0)
    if not bool(w.sum() > 0):
        w = torch.ones_like(w)
    mass, moment = _running(w), _running(w * x)
    middles = (torch.arange(1 << bits, dtype=torch.float64, device=x.device) + 0.5) / (1 << bits) * mass[-1]
    centres = x[torch.searchsorted(mass[1:].contiguous(), middles).clamp(max=len(x) - 1)]
    for _ in range(_ROUNDS):
        cuts = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))])
        held = mass[ends].diff()
        moved = torch.where(held > 0, moment[ends].diff() / held.clamp(min=1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return Codebook.between(centres.float())


def q_norm(codebook: Codebook, unit: Tensor) -> Codebook:
    """Move the levels so that decoded entries have the mean and the deviation of `unit`; codes stay the same."""
    decoded, x = codebook.decode(codebook.encode(unit)).double(), unit.double()
    deviation = float(decoded.std(correction=0))
    stretch = float(x.std(correction=0)) / deviation if deviation > 0 else 1.0
    levels = (codebook.levels_L.double() - decoded.mean()) * stretch + x.mean()
    return Codebook(levels.float(), codebook.edges)


def _running(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, 2, ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


# ---- calibration ------------------------------------------------------------------------------------------------


def channel_ranges(x_NC: Tensor, share: float) -> Tensor:
    """Return the lowest and highest dense entry of each channel [2, C], with `share` of the entries beyond them.

    An end lies halfway to the first outlier, or a little beyond the last entry, never on one: the keys of the first
    block are functions of the token alone, so the very same numbers come back later, and rounding must not decide
    whether they are outliers.
    """
    order = torch.sort(x_NC, dim=0).values
    if share == 0:
        return torch.stack([order[0], order[-1]])
    beyond, last = round(share / 2 * (len(order) - 1)), len(order) - 1
    low, high = order[beyond], order[last - beyond]
    same = _SAME * (order[-1] - order[0])
    under = order.masked_fill(order >= low - same, -torch.inf).amax(0)
    over = order.masked_fill(order <= high + same, torch.inf).amin(0)
    return torch.stack(
        [
            torch.where(torch.isfinite(under), (low + under) / 2, low - same),
            torch.where(torch.isfinite(over), (high + over) / 2, high + same),
        ]
    )


def _codebook(x: Tensor, low: Tensor, high: Tensor, dense: Tensor, fisher: Tensor, config: Config) -> Codebook:
    if config.codebook == "uniform":
        return uniform(config.bits).to(x.device)
    unit = to_unit(x.float(), low, high)
    weight = ((high - low) / 2).square().expand_as(x) * (fisher if config.fisher else 1.0)
    codebook = k_means(unit[dense], weight[dense], config.bits)
    return q_norm(codebook, unit[dense]) if config.stretches else codebook


def _check(x_NC: Tensor, config: Config) -> None:
    if not bool(torch.isfinite(x_NC).all()):
        raise ValueError("kvquant: calibration met keys or values that are not finite")
    if x_NC.shape[1] * config.bits % 8:
        raise ValueError(
            f"kvquant: {x_NC.shape[1]} channels of {config.bits} bits do not fill whole bytes; "
            "valid: key heads times head size times bits divisible by 8"
        )


class Method(CacheMethod[Config], config=Config):
    """KVQuant."""

    bits: ClassVar[str] = "2-4 for each cached number; weights stay as they are"
    calibration: ClassVar[Calibration] = "gradients"
    paper: ClassVar[str] = (
        "Hooper et al. 2024, KVQuant: Towards 10 Million Context Length LLM Inference (arXiv 2401.18079)"
    )

    def fit_keys(self, x_NC: Tensor, fisher_NC: Tensor, config: Config) -> Quantizer:
        """Return the quantizer of one layer's keys: a range for each channel, or one that each token brings."""
        if config.keys == "token":
            return self.fit_values(x_NC, fisher_NC, config)
        _check(x_NC, config)
        range_2C = channel_ranges(x_NC.float(), config.outliers)
        dense = (x_NC >= range_2C[0]) & (x_NC <= range_2C[1])
        codebook = _codebook(x_NC, range_2C[:1], range_2C[1:], dense, fisher_NC, config)
        return Quantizer(config.bits, codebook, config.outliers, range_2C)

    def fit_values(self, x_NC: Tensor, fisher_NC: Tensor, config: Config) -> Quantizer:
        """Return the quantizer of one layer's values: each token brings its range."""
        _check(x_NC, config)
        # A share of a row that is less than one entry at either end can only be kept on average.
        counted = config.outliers == 0 or config.outliers * x_NC.shape[1] / 2 >= 1
        threshold = None if counted else threshold_of(x_NC.float(), config.outliers)
        apart = extremes(x_NC.float(), config.outliers) if threshold is None else distances(x_NC.float()) > threshold
        ranges = dense_range(x_NC.float(), apart).float()
        codebook = _codebook(x_NC, ranges[:, :1], ranges[:, 1:], ~apart, fisher_NC, config)
        return Quantizer(config.bits, codebook, config.outliers, threshold=threshold)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Quantizer:
        """Rebuild a quantizer from its `tensors()`."""
        book = Codebook(tensors["levels"], tensors["edges"])
        return Quantizer(config.bits, book, config.outliers, tensors.get("range"), tensors.get("threshold"))

    def baselines(self, config: Config) -> dict[str, CacheBaseline[Config]]:
        """Return even levels, ranges per token, and keys coded after RoPE, each with the same share of outliers."""
        plain = {"codebook": "uniform", "q_norm": False}
        tables = {"uniform": plain, "per token": plain | {"keys": "token"}}
        plainer = {name: config.model_copy(update=table) for name, table in tables.items()}
        baselines = {name: CacheBaseline(other) for name, other in plainer.items() if other != config}
        if config.keys == "channel":
            baselines["after RoPE"] = CacheBaseline(config, after_rope=True)
        return baselines
