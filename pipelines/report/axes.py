"""Scales, ticks and numbers as text: the arithmetic under every chart. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

NONE = "\N{EN DASH}"
"""Stands where there is no number."""
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T")


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


def tick(value: float) -> str:
    """Return the text of a tick: as short as it is exact."""
    if value and not 1e-4 <= abs(value) < 1e4:
        return short(value) if abs(value) >= 1 else f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.6g}"


def short(value: float | None) -> str:
    """Return a count in thousands, millions and so on: 12.7M."""
    return NONE if value is None else _scaled(value, 1000.0, _COUNT_UNITS, "")


def size(value: float | None) -> str:
    """Return bytes in decimal units: 541 kB."""
    return NONE if value is None else _scaled(value, 1000.0, _BYTE_UNITS, " ")


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: 55 s, 3 min 15 s, 2 h 10 min."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{number(seconds, 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _scaled(value: float, base: float, units: tuple[str, ...], gap: str) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g}{gap}{units[power]}" if abs(value) < 999.5 else f"{value:,.0f}{gap}{units[power]}"
