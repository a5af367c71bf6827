"""Sizes, durations and counts in the words that console, log, report and pictures share."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "-"
"""Stands in plain text where there is no number."""
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T")
_SECONDS_SHOWN_BELOW_S = 300.0


def size(count: float | None, none: str = NONE) -> str:
    """Return bytes in decimal units, three digits: 541 kB; `none` for None."""
    return none if count is None else _scaled(count, _BYTE_UNITS, " ")


def short(count: float | None, none: str = NONE) -> str:
    """Return a count in thousands, millions and so on, three digits: 12.7M; `none` for None."""
    return none if count is None else _scaled(count, _COUNT_UNITS, "")


def duration(seconds: float | None, none: str = NONE) -> str:
    """Return seconds as people say them: 0.5 s, 55 s, 3 min 15 s, 25 min, 2 h 10 min; `none` for None."""
    if seconds is None:
        return none
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < _SECONDS_SHOWN_BELOW_S:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _scaled(value: float, units: Sequence[str], gap: str) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000.0, power + 1
    return f"{value:,.0f}{gap}{units[power]}" if abs(value) >= 999.5 else f"{value:.3g}{gap}{units[power]}"
