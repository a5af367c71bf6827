"""Scales, ticks and numbers as text: the arithmetic under every chart. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipelines.core import quantity

NONE = "\N{EN DASH}"
"""Stands where there is no number."""
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_WORTH_A_BREAK = 3.0
"""A lower part that would have less than the third of an ordinary axis gets a part of its own."""
_VERY_FAR = 20.0
_GAP_PIXELS = 14.0
_RATIO_PLACES = (3, 6)
_LOWER_PART = 0.72
"""Share of a broken axis that its lower part has."""


@dataclass(frozen=True)
class Scale:
    """A map from data to pixels.

    Attributes:
        low: data value at pixel `start`.
        high: data value at pixel `end`.
        start: pixel of the low end.
        end: pixel of the high end; less than `start` for a vertical axis.
        log: logarithmic instead of linear; `low` is then above 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values outside of the ends are clamped to them."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Return round values within the ends, about so many of them."""
        if self.log:
            marks = _log_ticks(self.low, self.high, about)
            if len(marks) >= 3:
                return marks
        return _linear_ticks(self.low, self.high, about)


@dataclass(frozen=True)
class Broken:
    """A vertical scale in two parts: what lies close together below, what lies far off above it.

    It is used like a `Scale`; between the parts nothing is to scale.
    """

    lower: Scale
    upper: Scale

    @property
    def start(self) -> float:
        """Pixel of the low end."""
        return self.lower.start

    @property
    def end(self) -> float:
        """Pixel of the high end."""
        return self.upper.end

    @property
    def log(self) -> bool:
        """Both parts are linear."""
        return False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.lower(value) if value <= self.lower.high else self.upper(value)

    def ticks(self, about: int = 5) -> list[float]:
        """Return round values of both parts."""
        return self.lower.ticks(about) + self.upper.ticks(2)


def fit_broken(
    intervals: Sequence[tuple[float, float, float]], start: float, end: float, *, far: Sequence[float] = ()
) -> Scale | Broken:
    """Return a scale that keeps values apart that lie close together, beside others that lie far off.

    It is broken above the values, or above the lower group of them where the others lie very far off; unless what
    lies below the break would have enough room on an ordinary axis too.

    Args:
        intervals: low, value and high of what has to be told apart; a low or high may be NaN.
        start: pixel of the low end.
        end: pixel of the high end.
        far: what may lie above the break, such as baselines.
    """
    values = sorted(value for _, value, _ in intervals)
    every = sorted(filter(finite, [v for interval in intervals for v in interval] + list(far)))
    if not values:
        return fit(every, start, end, pad=0.06)
    highest = _end_of_lower_group(values)
    group = [v for interval in intervals if interval[1] <= highest for v in interval if finite(v)]
    reach = max(group) + (max(group) - min(group))
    below, above = [v for v in every if v <= reach], [v for v in every if v > reach]
    if not above or (below[-1] - below[0]) * _WORTH_A_BREAK > above[-1] - below[0]:
        return fit(every, start, end, pad=0.06)
    middle = start + (end - start) * _LOWER_PART
    gap = math.copysign(_GAP_PIXELS, end - start)
    return Broken(fit(below, start, middle, pad=0.1), fit(above, middle + gap, end, pad=0.2))


def _end_of_lower_group(values: list[float]) -> float:
    """Return the highest of sorted values; where some lie very far off, the highest of at least two below them."""
    for below, above in pairwise(values[1:]):
        if below > values[0] and above - values[0] > _VERY_FAR * (below - values[0]):
            return below
    return values[-1]


def fit(
    values: Iterable[float | None], start: float, end: float, *, log: bool = False, zero: bool = False, pad: float = 0.0
) -> Scale:
    """Return a scale that shows every finite value (on a logarithmic one: every positive value).

    Args:
        values: data; None, NaN and infinities are passed over.
        start: pixel of the low end.
        end: pixel of the high end.
        log: logarithmic.
        zero: let a linear scale begin at 0 or below.
        pad: free room at both ends, as a fraction of the range.
    """
    shown = [v for v in values if v is not None and finite(v) and (v > 0 or not log)]
    low, high = (min(shown), max(shown)) if shown else (1.0, 10.0)
    if log:
        spread = (high / low) ** pad if high > low else 2.0
        return Scale(low / spread, high * spread, start, end, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 1.0
        return Scale(low - room, high + room, start, end)
    room = (high - low) * pad
    return Scale(low if zero and low == 0 else low - room, high + room, start, end)


def finite(value: float | None) -> bool:
    """Return whether there is a number to draw."""
    return value is not None and math.isfinite(value)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in _NICE if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    places = 2 - math.floor(math.log10(step))
    return [round(index * step, places) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, or the powers alone (or every so many) where those are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        marks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(marks) <= about + 2:
            return marks
    return marks[:: math.ceil(len(marks) / about)]


# ---- numbers as text --------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, without exponent where that is readable."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def ratio(value: float | None, *others: float | None) -> str:
    """Return a ratio with the digits that tell it, and the others shown beside it, from one: 1.00021, not 1.

    Args:
        value: the ratio.
        *others: the ends of its interval, which get as many digits.
    """
    if value is None or not math.isfinite(value):
        return number(value)
    apart = [abs(v - 1.0) for v in (value, *others) if v is not None and math.isfinite(v) and v != 1.0]
    places = 2 - math.floor(math.log10(max(apart))) - 1 if apart else _RATIO_PLACES[0]
    return f"{value:,.{min(max(places, _RATIO_PLACES[0]), _RATIO_PLACES[1])}f}"


def tick(value: float) -> str:
    """Return the text of a tick: as short as it is exact."""
    if value and not 1e-4 <= abs(value) < 1e4:
        return quantity.short(value) if abs(value) >= 1 else f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.6g}"
