"""Calibrators: how far the range of a tensor reaches that is stored with 8 bits and one scale.

All but `highest` and `percentile` look at a histogram of magnitudes, as in Wu et al. 2020 (arXiv 2004.09602).
Shapes: N values, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

BINS = 2048
_LEVELS = 128
"""Magnitudes that 8 bits can tell apart."""
_STRIDE = 16
"""Bins between two ranges that the entropy search tries."""
_FRACTIONS = 100


def highest(values: Tensor) -> float:
    """Return the largest magnitude."""
    return float(values.abs().max())


def percentile(values: Tensor, percent: float) -> float:
    """Return the magnitude below which `percent` of a hundred lie."""
    flat = values.abs().flatten()
    return float(flat.kthvalue(max(1, min(len(flat), round(percent / 100 * len(flat))))).values)


def least_squares(values: Tensor) -> float:
    """Return the range with the least squared error, rounding and clipping together."""
    counts_B, centres_B = histogram(values)
    top = float(values.abs().max())
    ranges = top * torch.arange(1, _FRACTIONS + 1, dtype=torch.float64, device=values.device) / _FRACTIONS
    scale = ranges.unsqueeze(1) / (_LEVELS - 1)
    rounded = (centres_B / scale).round().clamp(max=_LEVELS - 1) * scale
    errors = ((rounded - centres_B).square() * counts_B).sum(1)
    return float(ranges[errors.argmin()])


def entropy(values: Tensor) -> float:
    """Return the range whose 128 levels lose the least information: KL divergence from the clipped distribution."""
    counts_B, _ = histogram(values)
    widths = range(_LEVELS, BINS + 1, _STRIDE)
    losses = torch.stack([_divergence(counts_B, width) for width in widths])
    return float(values.abs().max()) * widths[int(losses.argmin())] / BINS


def histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and centres [B] of the magnitudes, float64, from zero to the largest."""
    size = values.abs().flatten().float()
    top = float(size.max()) or 1.0
    counts_B = torch.histc(size, BINS, 0.0, top).double()
    return counts_B, (torch.arange(BINS, dtype=torch.float64, device=size.device) + 0.5) * (top / BINS)


def _divergence(counts_B: Tensor, width: int) -> Tensor:
    """Return KL(P || Q): P is clipped to the first `width` bins, Q is P spread evenly over what each level covers."""
    kept = counts_B[:width]
    clipped = kept.clone()
    clipped[-1] += counts_B[width:].sum()
    level = torch.arange(width, device=kept.device) * _LEVELS // width
    filled = (kept > 0).double()
    mass = kept.new_zeros(_LEVELS).index_add_(0, level, kept)
    places = kept.new_zeros(_LEVELS).index_add_(0, level, filled)
    spread = (mass / places.clamp(min=1))[level] * filled
    p, q = clipped / clipped.sum(), spread / spread.sum()
    seen = p > 0
    return (p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum()
