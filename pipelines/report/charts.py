"""Line charts and bars as SVG text: points in, markup out. Pure.

Colours come from the page's style sheet, so that they follow light and dark; names are escaped here. matplotlib was
tried instead: the same page took 4.4 s of processor time instead of 0.3 s at the end of every run, also a cached one,
was half as large again, and its check for tensors imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from pipelines.report.axes import Broken, Scale, finite, fit, tick

COLOURS = 8
"""Colours and dash patterns that the style sheet knows: classes k0 ... k7."""
LETTER = 6.8
"""Mean width of a letter at 12 px."""
_POINTS = 1200
"""Points drawn per curve: more cannot be told apart, and would only make the page heavy."""
_LEFT = 66.0

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y) in order of x; a y of None or NaN is a gap."""

    name: str
    points: Sequence[Point]
    markers: bool = False
    """Draw each point: for curves that were measured now and then."""
    raw: Sequence[Point] = ()
    """What `points` was smoothed from: drawn pale behind it."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    label: str
    """Quantity and unit."""
    log: bool = False
    zero: bool = False
    """Begin at 0."""
    text: Callable[[float], str] = tick


@dataclass(frozen=True)
class Frame:
    """A plot area with its two scales, in pixels of the view box."""

    width: float
    height: float
    x: Scale
    y: Scale | Broken

    def within(self, body: str, label: str) -> str:
        """Return the SVG element around a chart's body."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(label)}">'
            f"<title>{escape(label)}</title>{body}</svg>"
        )


def lines(series: Sequence[Series], x: Axis, y: Axis, title: str, width: float = 540, height: float = 300) -> str:
    """Return a line chart with a legend above; a curve of one point is drawn as a dot.

    Args:
        series: curves; on a logarithmic axis values of 0 and below are gaps.
        x: horizontal axis.
        y: vertical axis.
        title: what the chart shows, for readers that cannot see it.
        width: of the view box, pixels.
        height: of the view box, pixels.
    """
    keys, top = _legend([s.name for s in series], width)
    xs = [p[0] for s in series for p in s.points if finite(p[1])]
    ys = [p[1] for s in series for p in (*s.points, *thin(s.raw))]
    across = fit(xs, _LEFT, width - 14, log=x.log, zero=x.zero)
    frame = Frame(width, height, across, fit(ys, height - 46, top + 6, log=y.log, zero=y.zero, pad=0.06))
    behind = "".join(_curve(Series("", s.raw), frame, i % COLOURS, "raw") for i, s in enumerate(series) if s.raw)
    curves = behind + "".join(_curve(s, frame, i % COLOURS) for i, s in enumerate(series))
    empty = "" if any(map(finite, ys)) else f'<text x="{width / 2}" y="{height / 2}" class="mid">no points</text>'
    return frame.within(keys + axes(frame, x, y) + curves + empty, title)


def bars(rows: Sequence[tuple[str, float]], title: str, text: Callable[[float], str], width: float = 540) -> str:
    """Return horizontal bars from 0, each with its name on the left and its value at its end."""
    left = 16 + LETTER * max((len(name) for name, _ in rows), default=0)
    scale = fit([v for _, v in rows], left, width - 90, zero=True)
    parts = []
    for index, (name, value) in enumerate(rows):
        y = 26 * index + 4
        length = max(scale(value) - left, 1.0)
        parts.append(
            f'<text x="{left - 8:.1f}" y="{y + 14}" class="end">{escape(name)}</text>'
            f'<rect x="{left:.1f}" y="{y}" width="{length:.1f}" height="19" rx="2" class="bar"/>'
            f'<text x="{left + length + 7:.1f}" y="{y + 14}" class="value">{escape(text(value))}</text>'
        )
    return Frame(width, 26 * len(rows) + 8, scale, scale).within("".join(parts), title)


def axes(frame: Frame, x: Axis, y: Axis) -> str:
    """Return grid, ticks and labels of both axes."""
    left, right, bottom, top = frame.x.start, frame.x.end, frame.y.start, frame.y.end
    parts = []
    for mark in frame.y.ticks(5):
        at = frame.y(mark)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" class="grid-line"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" class="end">{escape(y.text(mark))}</text>')
    for mark in frame.x.ticks(max(3, int((right - left) / 90))):
        at = frame.x(mark)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}" class="axis"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" class="mid">{escape(x.text(mark))}</text>')
    parts.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{bottom + 37}" class="mid label">{escape(x.label)}</text>')
    middle = f"{(top + bottom) / 2:.1f}"
    turn = f'transform="rotate(-90 12 {middle})"'
    parts.append(f'<text x="12" y="{middle}" {turn} class="mid label">{escape(y.label)}</text>')
    if isinstance(frame.y, Broken):
        parts.append(_break(left, frame.y.lower.end, frame.y.upper.start))
    return "".join(parts)


def _break(left: float, below: float, above: float) -> str:
    """Return the two strokes across an axis that is not to scale here."""
    strokes = "".join(f'<path d="M{left - 6} {y + 3:.1f}l12 -6" class="axis"/>' for y in (below, above))
    text = f'<text x="{left + 12}" y="{(below + above) / 2 + 4:.1f}" class="break">not to scale across this gap</text>'
    return strokes + text


def thin(points: Sequence[Point], limit: int = _POINTS) -> list[Point]:
    """Return about `limit` points at most that look the same: the lowest and highest of each stretch, and gaps."""
    if len(points) <= limit:
        return list(points)
    pieces = limit // 2
    kept: list[Point] = []
    for start, stop in pairwise(round(i * len(points) / pieces) for i in range(pieces + 1)):
        seen = [p for p in points[start:stop] if finite(p[1])]
        ends = {min(seen, key=_height), max(seen, key=_height)} if seen else {points[start]}
        kept += sorted(ends, key=lambda p: p[0])
    return kept


def _height(point: Point) -> float:
    return point[1] if point[1] is not None else 0.0


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the running mean of a curve over a thirtieth of its points, centred; gaps stay gaps."""
    half = len(points) // 60
    smoothed: list[Point] = []
    for index, (x, y) in enumerate(points):
        near = [v for _, v in points[max(0, index - half) : index + half + 1] if v is not None and finite(v)]
        smoothed.append((x, sum(near) / len(near) if y is not None and finite(y) else None))
    return smoothed


def _curve(series: Series, frame: Frame, colour: int, kind: str = "curve") -> str:
    parts = []
    for run in _runs(thin(series.points), frame):
        pixels = [(frame.x(x), frame.y(y)) for x, y in run]
        if len(pixels) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            parts.append(f'<polyline points="{path}" class="{kind} k{colour}"/>')
        if series.markers or len(pixels) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" class="dot k{colour}"/>' for x, y in pixels]
    return "".join(parts)


def _runs(points: Sequence[Point], frame: Frame) -> Iterator[list[tuple[float, float]]]:
    """Yield the stretches between gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is None or not finite(y) or (frame.y.log and y <= 0) or (frame.x.log and x <= 0):
            if run:
                yield run
            run = []
        else:
            run.append((x, y))
    if run:
        yield run


def _legend(names: Sequence[str], width: float) -> tuple[str, float]:
    """Return the keys above the plot, and the height that they take."""
    if len(names) < 2:
        return "", 8.0
    parts, x, y = [], _LEFT, 12.0
    for index, name in enumerate(names):
        room = 46 + LETTER * len(name)
        if x + room > width and x > _LEFT:
            x, y = _LEFT, y + 18
        colour = index % COLOURS
        parts.append(f'<line x1="{x:.1f}" x2="{x + 24:.1f}" y1="{y}" y2="{y}" class="curve k{colour}"/>')
        parts.append(f'<text x="{x + 30:.1f}" y="{y + 4}" class="key">{escape(name)}</text>')
        x += room
    return "".join(parts), y + 14
