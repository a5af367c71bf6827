"""The picture of size against quality: models as points with error bars, baselines as lines or small marks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from pipelines.report.axes import finite, fit, fit_broken, number, ratio
from pipelines.report.charts import COLOURS, LETTER, Axis, Frame, axes

_HEIGHT = 440.0
_LEFT = 92.0
"""Room for ticks with many digits."""
_SHAPES = (
    "m0 -6l6 6l-6 6l-6 -6z",
    "m-5 -5h10v10h-10z",
    "m0 -6l6 11h-12z",
    "m-5 -5l10 10m0 -10l-10 10",
    "m0 6l6 -11h-12z",
    "m-6 0h12m-6 -6v12",
)
"""Diamond, square, triangle, cross, triangle upside down, plus: paths from their middle."""
_DROPS = (0, *(sign * step for step in range(16, 225, 16) for sign in (-1, 1)))
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
    kind: str = ""
    """What a baseline is; baselines of one kind have one mark, which the legend names."""
    beside: float | None = None
    """Value of the variant that a baseline is compared with."""


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
        baselines: those that have a size: a mark for each kind, named in the legend, tied to its variant.
        width: of the view box, pixels.
    """
    shown = [m for m in models if finite(m.value)]
    marked = [m for m in baselines if finite(m.value)]
    near = [(m.low, m.value, m.high) for m in shown]
    far = [m.value for m in marked] + [v for _, v in levels]
    sizes = fit([m.size for m in (*shown, *marked)], _LEFT, width - 150, log=x.log, pad=0.2)
    kinds = list(dict.fromkeys(m.kind for m in marked))
    keys, top = _legend(kinds) if kinds else ("", 14.0)
    frame = Frame(width, _HEIGHT, sizes, fit_broken(near, _HEIGHT - 46, top, far=far))
    best = frontier(shown)
    lines = "".join(_line([m for m in line if finite(m.value)], frame) for line in joined)
    marks = "".join(_baseline(m, kinds.index(m.kind), frame) for m in marked) + "".join(
        _mark(m, frame, filled=m.name in best) for m in shown
    )
    behind = keys + axes(frame, x, y) + _level_lines(levels, frame) + lines
    return frame.within(behind + marks + _names([*shown], [*shown, *marked], levels, frame), title)


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
    tip = f"{model.name}: {number(model.value, 6)} [{number(model.low, 6)}, {number(model.high, 6)}]"
    kind = "filled" if filled else "hollow"
    return f'{bar}{ring}<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{kind}"><title>{escape(tip)}</title></circle>'


def _line(models: Sequence[Model], frame: Frame) -> str:
    """Return the line through the sizes of one method; nothing for a single one."""
    points = " ".join(f"{frame.x(m.size):.1f},{frame.y(m.value):.1f}" for m in models)
    return f'<polyline points="{points}" class="method"/>' if len(models) > 1 else ""


def _baseline(model: Model, shape: int, frame: Frame) -> str:
    """Return a baseline's mark, and a thin line to the variant that it is compared with."""
    x, y = frame.x(model.size), frame.y(model.value)
    tie = ""
    if model.beside is not None and finite(model.beside):
        tie = f'<path d="M{x:.1f} {y:.1f}V{frame.y(model.beside):.1f}" class="tie"/>'
    tip = escape(f"{model.name}: {ratio(model.value)}")
    return f"{tie}{_shape(x, y, shape)}<title>{tip}</title></path>"


def _shape(x: float, y: float, shape: int) -> str:
    """Return the opened path of one of the marks that tell baselines apart without colour."""
    return f'<path d="M{x:.1f} {y:.1f}{_SHAPES[shape % len(_SHAPES)]}" class="baseline k{shape % COLOURS}">'


def _legend(kinds: Sequence[str]) -> tuple[str, float]:
    """Return the keys of the baselines' marks, and the height that they take."""
    parts, x = [], _LEFT
    for shape, kind in enumerate(kinds):
        text = f"baseline: {kind}"
        parts.append(_shape(x + 6, 10, shape) + "</path>")
        parts.append(f'<text x="{x + 18:.1f}" y="14" class="key">{escape(text)}</text>')
        x += 36 + LETTER * len(text)
    return "".join(parts), 34.0


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


def _names(models: Sequence[Model], points: Sequence[Model], levels: Sequence[tuple[str, float]], frame: Frame) -> str:
    """Return the labels of models, each at the first place around its point that no point and no line takes."""
    taken = list(_obstacles(points, levels, frame))
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
