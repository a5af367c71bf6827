"""The picture of size against quality: models as points with error bars, baselines as lines or diamonds. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from pipelines.report.axes import finite, fit, number
from pipelines.report.charts import LETTER, Axis, Frame, axes

_HEIGHT = 440.0
_DROPS = (0, -16, 16, -32, 32, -48, 48, -64, 64, -80, 80, -96, 96, -112, 112, -128, 128)
"""How far a label may move up or down from its point, in the order of trial."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Model:
    """A model in the picture."""

    name: str
    size: float
    """Bytes on disk."""
    value: float
    """Bits per byte, or their ratio to the base's."""
    low: float
    high: float
    chosen: bool = False
    """Put forward as champion."""


def frontier(models: Sequence[Model]) -> set[str]:
    """Return the names of the models that no other one equals or beats in size and value at once."""
    return {m.name for m in models if not any(_dominates(other, m) for other in models)}


def draw(
    models: Sequence[Model],
    levels: Sequence[tuple[str, float]],
    x: Axis,
    y: Axis,
    title: str,
    *,
    joined: Sequence[Sequence[Model]] = (),
    baselines: Sequence[Model] = (),
    width: float = 1100,
) -> str:
    """Return the picture as SVG.

    Args:
        models: filled where nothing is smaller and better at once, hollow elsewhere.
        levels: name and value of the baselines that have no size: horizontal lines.
        x: size axis.
        y: quality axis.
        title: what the picture shows, for readers that cannot see it.
        joined: models that a line connects: one method at several sizes.
        baselines: those that have a size: diamonds, named when pointed at.
        width: of the view box, pixels.
    """
    shown = [m for m in models if finite(m.value)]
    diamonds = [m for m in baselines if finite(m.value)]
    ys = [v for m in shown for v in (m.low, m.value, m.high)] + [m.value for m in diamonds] + [v for _, v in levels]
    sizes = fit([m.size for m in (*shown, *diamonds)], 66, width - 150, log=x.log, pad=0.2)
    frame = Frame(width, _HEIGHT, sizes, fit(ys, _HEIGHT - 46, 14, log=y.log, pad=0.06))
    best = frontier(shown)
    lines = "".join(_line([m for m in line if finite(m.value)], frame) for line in joined)
    marks = "".join(_diamond(m, frame) for m in diamonds) + "".join(
        _mark(m, frame, filled=m.name in best) for m in shown
    )
    behind = axes(frame, x, y) + _level_lines(levels, frame) + lines
    return frame.within(behind + marks + _names([*shown], levels, frame), title)


def _dominates(one: Model, other: Model) -> bool:
    no_worse = one.size <= other.size and one.value <= other.value
    return no_worse and (one.size, one.value) != (other.size, other.value)


def _mark(model: Model, frame: Frame, *, filled: bool) -> str:
    x, y = frame.x(model.size), frame.y(model.value)
    bar = ""
    if finite(model.low) and finite(model.high):
        low, high = frame.y(model.low), frame.y(model.high)
        caps = "".join(f"M{x - 5:.1f} {end:.1f}H{x + 5:.1f}" for end in (low, high))
        bar = f'<path d="M{x:.1f} {low:.1f}V{high:.1f}{caps}" class="error"/>'
    ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" class="ring"/>' if model.chosen else ""
    tip = f"{model.name}: {number(model.value, 4)} [{number(model.low, 4)}, {number(model.high, 4)}]"
    kind = "filled" if filled else "hollow"
    return f'{bar}{ring}<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{kind}"><title>{escape(tip)}</title></circle>'


def _line(models: Sequence[Model], frame: Frame) -> str:
    """Return the line through the sizes of one method; nothing for a single one."""
    points = " ".join(f"{frame.x(m.size):.1f},{frame.y(m.value):.1f}" for m in models)
    return f'<polyline points="{points}" class="method"/>' if len(models) > 1 else ""


def _diamond(model: Model, frame: Frame) -> str:
    x, y = frame.x(model.size), frame.y(model.value)
    tip = escape(f"{model.name}: {number(model.value, 4)}")
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" class="baseline"><title>{tip}</title></path>'


def _level_lines(levels: Sequence[tuple[str, float]], frame: Frame) -> str:
    """Return one line per baseline, its label right of the plot, moved down where it would lie on another."""
    right, parts, last = frame.x.end, [], float("-inf")
    for name, value in sorted((n for n in levels if finite(n[1])), key=lambda level: -level[1]):
        y = frame.y(value)
        last = max(y, last + 16)
        parts.append(f'<line x1="{frame.x.start}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="level"/>')
        parts.append(f'<path d="M{right} {y:.1f}L{right + 14} {last:.1f}" class="level"/>')
        text = f"{name} {number(value, 4)}"
        parts.append(f'<text x="{right + 18}" y="{last + 4:.1f}" class="key">{escape(text)}</text>')
    return "".join(parts)


def _names(models: Sequence[Model], levels: Sequence[tuple[str, float]], frame: Frame) -> str:
    """Return the labels, each at the first place around its point that is free."""
    taken = list(_obstacles(models, levels, frame))
    parts = []
    for model in sorted(models, key=lambda m: m.value):
        x, y, wide = frame.x(model.size), frame.y(model.value), LETTER * len(model.name) * 1.1
        left, top = _place(x, y, wide, taken, frame)
        taken.append((left, top, left + wide, top + 16))
        if abs(top - (y - 8)) > 20:
            end = left if left > x else left + wide
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{end:.1f} {top + 8:.1f}" class="leader"/>')
        kind = "name chosen" if model.chosen else "name"
        parts.append(f'<text x="{left:.1f}" y="{top + 12:.1f}" class="{kind}">{escape(model.name)}</text>')
    return "".join(parts)


def _obstacles(models: Sequence[Model], levels: Sequence[tuple[str, float]], frame: Frame) -> Iterator[Box]:
    """Yield what a label must not cover: points, error bars, lines."""
    for model in models:
        x, y = frame.x(model.size), frame.y(model.value)
        yield x - 9, y - 9, x + 9, y + 9
        if finite(model.low) and finite(model.high):
            yield x - 4, frame.y(model.high), x + 4, frame.y(model.low)
    for _, value in levels:
        yield frame.x.start, frame.y(value) - 1, frame.x.end, frame.y(value) + 1


def _place(x: float, y: float, wide: float, taken: Sequence[Box], frame: Frame) -> tuple[float, float]:
    """Return the upper left corner of a label of this width for the point (x, y)."""
    places = [(left, y - 8 + drop) for drop in _DROPS for left in (x + 14, x - 14 - wide)]
    inside = [
        (left, top)
        for left, top in places
        if left > frame.x.start and left + wide < frame.x.end and frame.y.end - 8 < top < frame.y.start - 16
    ]
    free = (p for p in inside if not any(_overlap((*p, p[0] + wide, p[1] + 16), box) for box in taken))
    return next(free, inside[0] if inside else places[0])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
