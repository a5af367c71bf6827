"""Print our row of the table of well-kept repositories: lengths, annotations, docstrings, tests per source line."""

from __future__ import annotations

import ast
import json
import statistics
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = ("flows", "pipelines", "models")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure() -> dict[str, float]:
    """Return the row: lengths in lines, shares in percent."""
    sources = sorted(path for folder in SOURCES for path in (CHECKOUT / folder).rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    public = [node for tree in trees.values() for node in _public(tree)]
    modules = [tree for path, tree in trees.items() if path.name != "__init__.py"]
    lines = [_lines(path) for path in sources if path.name != "__init__.py"]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    tests = sum(_lines(path) for path in (CHECKOUT / "tests").rglob("*.py"))
    return {
        "files": len(sources),
        "loc": sum(lines),
        "file_median": statistics.median(lines),
        "file_p90": _quantile(lines, 0.90),
        "file_max": max(lines),
        "function_median": statistics.median(lengths),
        "function_p95": _quantile(lengths, 0.95),
        "function_max": max(lengths),
        "annotated_percent": _percent([_annotated(node) for node in functions]),
        "public_docstring_percent": _percent([ast.get_docstring(node) is not None for node in public]),
        "module_docstring_percent": _percent([ast.get_docstring(tree) is not None for tree in modules]),
        "tests_per_source": round(tests / sum(lines), 2),
    }


def _lines(path: Path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _quantile(values: list[int], q: float) -> int:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _percent(flags: list[bool]) -> float:
    return round(100.0 * sum(flags) / max(len(flags), 1), 1)


def _annotated(node: Function) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    named = [a for a in arguments if a is not None and a.arg not in {"self", "cls"}]
    return node.returns is not None and all(a.annotation is not None for a in named)


def _public(tree: ast.Module) -> list[Function | ast.ClassDef]:
    found: list[Function | ast.ClassDef] = []
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += [n for n in node.body if isinstance(n, Function) and not n.name.startswith("_")]
    return found


if __name__ == "__main__":
    json.dump(measure(), sys.stdout, indent=1)
