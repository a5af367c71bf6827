"""KVQuant: keys and values of the attention cache in 2 to 4 bits.

Keys are stored per channel and before the rotation of RoPE, on ranges found in calibration; values per token, on the
range of that token. Every vector is brought to [-1, 1] and coded by one codebook of 2^b levels for each layer and side
(keys, values): one-dimensional k-means or a uniform grid. A small share of entries at
both ends is kept exactly, in float16 with its place ("dense and sparse"), and so are the first tokens, which attention
leans on. Where 2 bits shrink the spread, the levels are stretched so that mean and deviation are those of the data
(Q-Norm).

K-means weights an entry by the square of its half range, because that is what an error in the unit interval is worth
in the cache. The paper weights by the squared gradient instead; `fisher` multiplies both. It is off by default, because
it did not help where it was measured: the bench of the tests, 24 validation documents, three draws of 64 calibration
sequences, perplexity over the parent's with gradients and without: 1.049, 1.050, 1.052 against 1.040, 1.035, 1.039 at
2 bits; 1.007, 1.011, 1.009 against 1.010, 1.009, 1.011 at 3; 1.003 thrice against 1.002 thrice at 4. The paper's weight
alone varied most (1.042 to 1.058 at 2 bits); without outliers it was the best (1.068 to 1.071 against 1.076 to 1.078).

Pure functions of rows; the cache that stores them is `models.compression.modules.quantized_cache`.

Shapes: N rows (tokens of all sequences), C channels (all key heads side by side), L levels, S stored outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from models.compression.base import Calibration, Kind, MethodConfig
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

kind: Kind = "kv_cache"
bits = "2-4 for each cached number; weights stay as they are"
calibration: Calibration = "gradients"
paper = "Hooper et al. 2024, KVQuant: Towards 10 Million Context Length LLM Inference (arXiv 2401.18079)"

_HALF_MAX = 65504.0
_SAME = 1e-4
"""Entries nearer than this share of a channel's spread may be one number, rounded in two ways."""
_ROUNDS = 60
"""Lloyd iterations; on the calibration samples of the tests the codebook stands still after 20 to 40."""


class Config(MethodConfig):
    """Parameters of KVQuant."""

    bits: Literal[2, 3, 4] = Field(3, description="bits of one cached number")
    keys: Literal["channel", "token"] = Field("channel", description="what shares a range among the keys")
    codebook: Literal["nuq", "uniform"] = Field("nuq", description="levels by k-means on calibration data, or evenly")
    fisher: bool = Field(False, description="weight k-means by squared gradients too; see the measurements above")
    outliers: float = Field(
        0.01, ge=0.0, le=0.2, description="share of entries kept in float16, half of it at either end of a range"
    )
    q_norm: bool | None = Field(None, description="stretch the levels to the data's deviation; none: only at 2 bits")
    exact_tokens: int = Field(1, ge=0, le=1024, description="tokens at the start of a sequence kept in float16")

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


@dataclass(frozen=True)
class Codebook:
    """Levels in [-1, 1]: an entry gets the code of the interval between `edges`, and stands for that level."""

    levels_L: Tensor
    """Ascending, float32."""
    edges: Tensor
    """[L - 1] ascending, float32: where one code ends and the next begins."""

    def encode(self, unit: Tensor) -> Tensor:
        """Return the codes of entries in the unit interval, uint8, in their shape."""
        return torch.bucketize(unit.contiguous(), self.edges).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return what codes stand for, float32."""
        return self.levels_L[codes.long()]


def uniform(bits: int) -> Codebook:
    """Return 2^bits levels at even distances, the outermost at -1 and 1."""
    return _between(torch.linspace(-1.0, 1.0, 1 << bits))


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
    middles = (torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits) * mass[-1]
    centres = x[torch.searchsorted(mass[1:].contiguous(), middles).clamp(max=len(x) - 1)]
    for _ in range(_ROUNDS):
        cuts = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))])
        held = mass[ends].diff()
        moved = torch.where(held > 0, moment[ends].diff() / held.clamp(min=1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return _between(centres.float())


def q_norm(codebook: Codebook, unit: Tensor) -> Codebook:
    """Move the levels so that decoded entries have the mean and the deviation of `unit`; codes stay the same."""
    decoded, x = codebook.decode(codebook.encode(unit)).double(), unit.double()
    deviation = float(decoded.std(correction=0))
    stretch = float(x.std(correction=0)) / deviation if deviation > 0 else 1.0
    levels = (codebook.levels_L.double() - decoded.mean()) * stretch + x.mean()
    return Codebook(levels.float(), codebook.edges)


def _between(levels_L: Tensor) -> Codebook:
    return Codebook(levels_L, (levels_L[1:] + levels_L[:-1]) / 2)


def _running(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, 2, ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


# ---- rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Encoded rows as they are stored; appending and picking rows never decodes them."""

    codes_NB: Tensor
    """uint8: b bits for each of C channels, lowest bit first."""
    counts_N: Tensor
    """int16: outliers of each row."""
    columns_S: Tensor
    """int16: channel of each outlier, row after row."""
    values_S: Tensor
    """float16: the outliers."""
    ranges_NR: Tensor | None = None
    """float16: lowest dense entry of each group of a row, then the highest; None where channels have fixed ranges."""

    @property
    def bytes(self) -> int:
        """Size of everything stored."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if t is not None)

    def take(self, index_M: Tensor) -> Rows:
        """Return the rows `index_M`, in that order."""
        counts = self.counts_N.long()
        starts, picked = counts.cumsum(0) - counts, counts[index_M]
        first = picked.cumsum(0) - picked
        place = torch.arange(int(picked.sum()), device=index_M.device)
        place = place + torch.repeat_interleave(starts[index_M] - first, picked)
        ranges = None if self.ranges_NR is None else self.ranges_NR[index_M]
        return Rows(self.codes_NB[index_M], self.counts_N[index_M], self.columns_S[place], self.values_S[place], ranges)

    @staticmethod
    def joined(one: Rows, other: Rows) -> Rows:
        """Return the rows of both, one after the other."""
        ranges = None
        if one.ranges_NR is not None and other.ranges_NR is not None:
            ranges = torch.cat([one.ranges_NR, other.ranges_NR])
        return Rows(
            torch.cat([one.codes_NB, other.codes_NB]),
            torch.cat([one.counts_N, other.counts_N]),
            torch.cat([one.columns_S, other.columns_S]),
            torch.cat([one.values_S, other.values_S]),
            ranges,
        )


@dataclass(frozen=True)
class Quantizer:
    """How the keys, or the values, of one layer are coded."""

    bits: int
    codebook: Codebook
    outliers: float
    """Share of a row kept exactly; read only where rows bring their own range."""
    range_2C: Tensor | None = None
    """float32: lowest and highest dense entry of each channel; None: each row brings its own."""
    group: int = 0
    """Neighbouring channels that share a range where rows bring their own; 0: the whole row."""

    def encode(self, x_NC: Tensor) -> Rows:
        """Return rows as they are stored. Each row depends on itself alone."""
        x = x_NC.float().clamp(-_HALF_MAX, _HALF_MAX)
        if self.range_2C is not None:
            apart, ranges = self._beyond(x), None
            low, high = self.range_2C[0], self.range_2C[1]
        else:
            apart = extremes(x, self.outliers)
            ranges = dense_range(x, apart, self.group)
            low, high = self._ends(ranges, x.shape[1])
        codes = self.codebook.encode(to_unit(x, low, high))
        columns = torch.where(apart)[1].to(torch.int16)
        counts = apart.sum(1).to(torch.int16)
        return Rows(pack(codes, self.bits), counts, columns, x[apart].half(), ranges)

    def decode(self, rows: Rows) -> Tensor:
        """Return the rows [N, C], float32."""
        if self.range_2C is not None:
            low, high, width = self.range_2C[0], self.range_2C[1], self.range_2C.shape[1]
        else:
            assert rows.ranges_NR is not None
            width = rows.codes_NB.shape[1] * 8 // self.bits
            low, high = self._ends(rows.ranges_NR, width)
        unit = self.codebook.decode(unpack(rows.codes_NB, self.bits, width))
        x_NC = unit * (high - low) / 2 + (high + low) / 2
        row_S = torch.repeat_interleave(rows.counts_N.long())
        x_NC[row_S, rows.columns_S.long()] = rows.values_S.float()
        return x_NC

    def tensors(self) -> dict[str, Tensor]:
        """Return what the tables of this quantizer are stored as."""
        ranges = {} if self.range_2C is None else {"range": self.range_2C}
        return {"levels": self.codebook.levels_L, "edges": self.codebook.edges, **ranges}

    def to(self, device: torch.device) -> Quantizer:
        """Return the same tables on another device."""
        book = Codebook(self.codebook.levels_L.to(device), self.codebook.edges.to(device))
        range_2C = None if self.range_2C is None else self.range_2C.to(device)
        return Quantizer(self.bits, book, self.outliers, range_2C, self.group)

    def _ends(self, ranges_NR: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return lowest and highest of every entry, or of every row where it is one group."""
        low, high = ranges_NR.float().chunk(2, dim=1)
        if low.shape[1] > 1:
            low, high = (ends.repeat_interleave(width // low.shape[1], 1) for ends in (low, high))
        return low, high

    def _beyond(self, x_NC: Tensor) -> Tensor:
        """Return which entries are outliers: those outside the range of their channel, if any are kept at all."""
        assert self.range_2C is not None
        if self.outliers == 0:
            return torch.zeros_like(x_NC, dtype=torch.bool)
        return (x_NC < self.range_2C[0]) | (x_NC > self.range_2C[1])


def restore(tensors: Mapping[str, Tensor], config: Config) -> Quantizer:
    """Rebuild a quantizer from its `tensors()`."""
    book = Codebook(tensors["levels"], tensors["edges"])
    return Quantizer(config.bits, book, config.outliers, tensors.get("range"))


def extremes(x_NC: Tensor, share: float) -> Tensor:
    """Return the mask of the lowest and the highest entries of each row, `share` of it in all, at least one each."""
    apart = torch.zeros_like(x_NC, dtype=torch.bool)
    if share == 0:
        return apart
    count = max(1, round(share * x_NC.shape[1] / 2))
    for largest in (True, False):
        apart.scatter_(1, x_NC.topk(count, dim=1, largest=largest).indices, value=True)
    return apart


def dense_range(x_NC: Tensor, apart_NC: Tensor, group: int = 0) -> Tensor:
    """Return the lowest entry of each group of a row that is not set apart, then the highest: float16 [N, R]."""
    groups = x_NC.shape[1] // (group or x_NC.shape[1])
    low = x_NC.masked_fill(apart_NC, torch.inf).unflatten(1, (groups, -1)).amin(2)
    high = x_NC.masked_fill(apart_NC, -torch.inf).unflatten(1, (groups, -1)).amax(2)
    return torch.cat([low, high], 1).half()


def rounding(bits: int, group: int) -> Quantizer:
    """Return round to nearest: every group of channels of a token brings its own range, nothing is fitted."""
    return Quantizer(bits, uniform(bits), 0.0, None, group)


def rounding_bytes(width: int, bits: int, group: int) -> int | None:
    """Return what `rounding` stores for a row of `width` channels; None where it does not divide them."""
    if width % (group or width) or width * bits % 8:
        return None
    return width * bits // 8 + 2 + 4 * (width // (group or width))


def to_unit(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map [low, high] to [-1, 1]; what lies outside is clipped, and an empty range maps to 0."""
    half = (high - low) / 2
    return torch.where(half > 0, (x - (high + low) / 2) / half.clamp(min=1e-30), torch.zeros_like(x)).clamp(-1.0, 1.0)


def pack(codes_NC: Tensor, bits: int) -> Tensor:
    """Pack codes below 2^bits densely, lowest bit first: uint8 [N, C * bits / 8].

    Raises:
        ValueError: a row does not fill whole bytes.
    """
    if codes_NC.shape[1] * bits % 8:
        raise ValueError(f"{codes_NC.shape[1]} codes of {bits} bits do not fill whole bytes")
    places = torch.arange(bits, dtype=torch.uint8, device=codes_NC.device)
    flags = ((codes_NC.unsqueeze(-1) >> places) & 1).flatten(1).unflatten(1, (-1, 8))
    return (flags << torch.arange(8, dtype=torch.uint8, device=codes_NC.device)).sum(-1, dtype=torch.uint8)


def unpack(bytes_NB: Tensor, bits: int, width: int) -> Tensor:
    """Return the codes uint8 [N, width] that `pack` packed."""
    flags = (bytes_NB.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bytes_NB.device)) & 1
    flags = flags.flatten(1)[:, : width * bits].unflatten(1, (width, bits))
    return (flags << torch.arange(bits, dtype=torch.uint8, device=bytes_NB.device)).sum(-1, dtype=torch.uint8)


# ---- calibration ------------------------------------------------------------------------------------------------


def fit_keys(x_NC: Tensor, fisher_NC: Tensor, config: Config) -> Quantizer:
    """Return the quantizer of one layer's keys.

    Args:
        x_NC: keys before RoPE over the calibration tokens.
        fisher_NC: squared gradient of the summed loss with respect to each of them.
        config: parameters.

    Raises:
        ValueError: entries that are not finite, or channels that do not fill whole bytes.
    """
    if config.keys == "token":
        return fit_values(x_NC, fisher_NC, config)
    _check(x_NC, config)
    range_2C = channel_ranges(x_NC.float(), config.outliers)
    dense = (x_NC >= range_2C[0]) & (x_NC <= range_2C[1])
    codebook = _codebook(x_NC, range_2C[:1], range_2C[1:], dense, fisher_NC, config)
    return Quantizer(config.bits, codebook, config.outliers, range_2C)


def fit_values(x_NC: Tensor, fisher_NC: Tensor, config: Config) -> Quantizer:
    """Return the quantizer of one layer's values; arguments as in `fit_keys`."""
    _check(x_NC, config)
    apart = extremes(x_NC.float(), config.outliers)
    ranges = dense_range(x_NC.float(), apart).float()
    codebook = _codebook(x_NC, ranges[:, :1], ranges[:, 1:], ~apart, fisher_NC, config)
    return Quantizer(config.bits, codebook, config.outliers)


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
        return uniform(config.bits)
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
