"""Quantized rows of the attention cache: codes of one codebook on a range, and outliers kept exactly beside them.

Every vector is brought to [-1, 1] by the range of its channels, or by one that it brings itself, and coded by the
levels of a codebook. Entries outside the range are stored in float16 with their channel. Each row depends on
itself alone, so rows can be appended, picked and decoded in any order.

Shapes: N rows (tokens of all sequences), C channels (all key heads side by side), L levels, S stored outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Codebook:
    """Levels in [-1, 1]: an entry gets the code of the interval between `edges`, and stands for that level."""

    levels_L: Tensor
    """Ascending, float32."""
    edges: Tensor
    """[L - 1] ascending, float32: where one code ends and the next begins."""

    @classmethod
    def between(cls, levels_L: Tensor) -> Self:
        """Return the codebook whose codes change halfway between two levels."""
        return cls(levels_L, (levels_L[1:] + levels_L[:-1]) / 2)

    def to(self, device: torch.device) -> Codebook:
        """Return the same levels on another device."""
        return Codebook(self.levels_L.to(device), self.edges.to(device))

    def encode(self, unit: Tensor) -> Tensor:
        """Return the codes of entries in the unit interval, uint8, in their shape."""
        return torch.bucketize(unit.contiguous(), self.edges).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return what codes stand for, float32."""
        return self.levels_L[codes.long()]


def uniform(bits: int) -> Codebook:
    """Return 2^bits levels at even distances, the outermost at -1 and 1."""
    return Codebook.between(torch.linspace(-1.0, 1.0, 1 << bits))


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
    """Share of entries kept exactly; a share of each row where rows bring their own range, without `threshold`."""
    range_2C: Tensor | None = None
    """float32: lowest and highest dense entry of each channel; None: each row brings its own."""
    threshold: Tensor | None = None
    """[1] float32: entries whose `distances` are larger are kept exactly, in rows too short to count a share of."""
    group: int = 0
    """Neighbouring channels that share a range where rows bring their own; 0: the whole row."""

    def encode(self, x_NC: Tensor) -> Rows:
        """Return rows as they are stored. Each row depends on itself alone."""
        x = x_NC.float().clamp(-_HALF_MAX, _HALF_MAX)
        if self.range_2C is not None:
            apart, ranges = self._beyond(x), None
            low, high = self.range_2C[0], self.range_2C[1]
        else:
            apart = extremes(x, self.outliers) if self.threshold is None else distances(x) > self.threshold
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
        own = {"range": self.range_2C, "threshold": self.threshold}
        given = {name: tensor for name, tensor in own.items() if tensor is not None}
        return {"levels": self.codebook.levels_L, "edges": self.codebook.edges, **given}

    def to(self, device: torch.device) -> Quantizer:
        """Return the same tables on another device."""
        range_2C, threshold = (None if t is None else t.to(device) for t in (self.range_2C, self.threshold))
        return Quantizer(self.bits, self.codebook.to(device), self.outliers, range_2C, threshold, self.group)

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


def extremes(x_NC: Tensor, share: float) -> Tensor:
    """Return the mask of the lowest and the highest entries of each row: `share` of it in all, in whole entries."""
    apart = torch.zeros_like(x_NC, dtype=torch.bool)
    count = round(share * x_NC.shape[1] / 2)
    for largest in (True, False):
        apart.scatter_(1, x_NC.topk(count, dim=1, largest=largest).indices, value=True)
    return apart


def distances(x_NC: Tensor) -> Tensor:
    """Return how far each entry is from the median of its row, over the mean of that in the row."""
    apart_NC = (x_NC - x_NC.median(1, keepdim=True).values).abs()
    return apart_NC / apart_NC.mean(1, keepdim=True).clamp(min=1e-30)


def threshold_of(x_NC: Tensor, share: float) -> Tensor:
    """Return the threshold [1] beyond which `share` of all entries lie, halfway between two of them."""
    sorted_M = distances(x_NC).flatten().sort().values
    beyond = min(max(1, round(share * len(sorted_M))), len(sorted_M) - 1)
    # Above 1 not all entries of a row can be beyond.
    return sorted_M[-beyond - 1 : len(sorted_M) - beyond + 1].mean().clamp(min=1.0).reshape(1)


def dense_range(x_NC: Tensor, apart_NC: Tensor, group: int = 0) -> Tensor:
    """Return the lowest entry of each group of a row that is not set apart, then the highest: float16 [N, R]."""
    groups = x_NC.shape[1] // (group or x_NC.shape[1])
    low = x_NC.masked_fill(apart_NC, torch.inf).unflatten(1, (groups, -1)).amin(2)
    high = x_NC.masked_fill(apart_NC, -torch.inf).unflatten(1, (groups, -1)).amax(2)
    return torch.cat([low, high], 1).half()


def rounding(bits: int, group: int) -> Quantizer:
    """Return round to nearest: every group of channels of a token brings its own range, nothing is fitted."""
    return Quantizer(bits, uniform(bits), 0.0, group=group)


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
