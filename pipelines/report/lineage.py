"""The graph of a run as a picture: which artifact came from which, with fingerprints and digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipelines.core.artifact import Artifact
from pipelines.core.stage import BASES, base_name

CORPUS = "corpus"
SHORT = 12
"""Characters of a hash that are shown."""
_COLUMNS = ("corpus", "prepare", "pretrain", "compress", "evaluate", "promote")
_BOX, _HIGH, _GAP, _ROW = 162.0, 58.0, 28.0, 74.0
_LETTERS = 19
"""Letters of a name that fit a box."""
_HEAD = 24.0
"""Room for the names of the columns."""


@dataclass(frozen=True)
class Node:
    """A box of the picture."""

    name: str
    column: int
    state: str
    lines: tuple[str, ...]


def edges(names: Sequence[str], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (from, to) of the graph; the corpus is a node, prepare's edges to later stages are left out.

    Args:
        names: nodes of the run.
        config: the run's configuration; `compress[].from` tells which model a variant was made from.
    """
    bases = {variant.get("name"): variant.get("from") for variant in config.get("compress") or []}
    pairs = [(CORPUS, "prepare"), ("prepare", "pretrain"), ("fetch", "pretrain"), ("base", "prepare")]
    whole = base_name(names)
    for name in names:
        stage, _, variant = name.partition(".")
        if stage == "compress":
            base = bases.get(variant)
            pairs.append((f"compress.{base}" if base in bases else whole, name))
        elif stage == "pretrain" and variant:
            pairs += [("prepare", name), ("fetch", name)]
        elif stage == "compare":
            pairs.append((f"pretrain.{variant}", name))
        elif stage == "evaluate":
            pairs.append((variant if variant in BASES else f"compress.{variant}", name))
            pairs.append((name, "promote"))
    known = {*names, CORPUS}
    return [(a, b) for a, b in pairs if a in known and b in known]


def draw(record: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> str:
    """Return the SVG of the run's graph; nodes without artifact have a dashed outline."""
    nodes = [Node(CORPUS, 0, "done", (f"DVC {str(record['data_hash'])[:SHORT]}",))]
    nodes += [_node(name, entry, artifacts.get(name)) for name, entry in record["nodes"].items()]
    rows = max(sum(n.column == c for n in nodes) for c in range(len(_COLUMNS)))
    places = _places(nodes, rows)
    arrows = "".join(_arrow(places[a], places[b]) for a, b in edges(list(record["nodes"]), record.get("config") or {}))
    width, height = len(_COLUMNS) * (_BOX + _GAP) - _GAP + 4, rows * _ROW + _HEAD
    title = "Lineage: " + ", ".join(n.name for n in nodes)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>{_heads()}{arrows}'
        + "".join(_draw(n, places[n.name]) for n in nodes)
        + "</svg>"
    )


def _node(name: str, entry: Mapping[str, Any], artifact: Artifact | None) -> Node:
    stage = str(entry["stage"])
    beside = "prepare" if stage == "fetch" else stage
    column = _COLUMNS.index(beside) if beside in _COLUMNS else len(_COLUMNS) - 1
    state = "done" if artifact else "missing"
    digest = f"digest {artifact.digest[:SHORT]}" if artifact else str(entry["state"])
    return Node(name, column, state, (f"print {str(entry['fingerprint'])[:SHORT]}", digest))


def _places(nodes: Sequence[Node], rows: int) -> dict[str, tuple[float, float]]:
    """Return the upper left corner of each box; columns are centred, the one of compress stands at the bottom."""
    places: dict[str, tuple[float, float]] = {}
    for column in range(len(_COLUMNS)):
        members = [n for n in nodes if n.column == column]
        free: float = rows - len(members)
        if column != _COLUMNS.index(
            "compress"
        ):  # its first row stays free for the arrow from pretrain to its evaluation
            free /= 2
        top = _HEAD + free * _ROW + (_ROW - _HIGH) / 2
        places |= {n.name: (2 + column * (_BOX + _GAP), top + i * _ROW) for i, n in enumerate(members)}
    return places


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return a curve from the right side of one box to the left side of another."""
    y1, y2 = start[1] + _HIGH / 2, end[1] + _HIGH / 2
    if start[0] == end[0]:  # a variant of a variant: around the left side of the column
        bend = start[0] - _GAP * 0.7
        return f'<path d="M{start[0]} {y1}C{bend} {y1} {bend} {y2} {end[0]} {y2}" class="edge" marker-end="url(#tip)"/>'
    x1, x2 = start[0] + _BOX, end[0]
    bend = x1 + _GAP / 2
    path = f"M{x1} {y1}C{bend} {y1} {bend} {y2} {x1 + _GAP} {y2}H{x2}"
    return f'<path d="{path}" class="edge" marker-end="url(#tip)"/>'


def _heads() -> str:
    middles = (2 + column * (_BOX + _GAP) + _BOX / 2 for column in range(len(_COLUMNS)))
    return "".join(f'<text x="{x}" y="14" class="mid label">{c}</text>' for x, c in zip(middles, _COLUMNS, strict=True))


def _draw(node: Node, place: tuple[float, float]) -> str:
    x, y = place
    variant = node.name.partition(".")[2] or node.name  # the column says the stage
    name = variant if len(variant) <= _LETTERS else variant[: _LETTERS - 1] + "…"
    parts = [f'<g><title>{escape(node.name)}</title><rect x="{x}" y="{y}" width="{_BOX}" height="{_HIGH}" rx="5" ']
    parts.append(f'class="node {node.state}"/><text x="{x + 10}" y="{y + 19}" class="name">{escape(name)}</text>')
    for index, line in enumerate(node.lines):
        parts.append(f'<text x="{x + 10}" y="{y + 35 + 15 * index}" class="hash">{escape(line)}</text>')
    return "".join(parts) + "</g>"
