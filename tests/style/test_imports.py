"""What import-linter cannot say: which single modules may touch a library, and what importing a package loads.

The layers themselves stand in `pyproject.toml` and are checked by `lint-imports` (`make check`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# library -> the folders or files that may import it, also inside functions
PLACES = {
    "prefect": ("flows/",),
    "mlflow": ("pipelines/tracking/", "pipelines/registry/"),
    "deepspeed": ("pipelines/training/engine.py", "pipelines/training/zero_binding.py"),
    "dvc": ("pipelines/data/",),
    "lm_eval": ("pipelines/evaluation/", "pipelines/data/evaluation_items.py"),
    "onnx": ("pipelines/deploy/",),
    "onnxruntime": ("pipelines/deploy/",),
    "gguf": ("pipelines/deploy/",),
    "torchao": ("pipelines/deploy/",),
    "typer": ("flows/",),
}
# packages or modules -> libraries that importing all their modules must not load
LIGHT = {
    "flows.cli flows.planner": ("torch", "prefect", "mlflow", "transformers"),
    "models pipelines.training": ("prefect", "mlflow", "deepspeed"),
    "pipelines": ("prefect",),
}
# A module that waits for its first use (`models/lazy.py`) stands in sys.modules, but none of its parts do.
LOAD = """
import importlib, pkgutil, sys
for name in sys.argv[1].split():
    top = importlib.import_module(name)
    for member in pkgutil.walk_packages(getattr(top, "__path__", []), top.__name__ + "."):
        if not member.name.endswith((".worker", ".parent_guard", ".__main__")):
            importlib.import_module(member.name)
print([name for name in sys.argv[2:] if any(loaded.startswith(name + ".") for loaded in sys.modules)])
"""


def imported_libraries(text: str) -> set[str]:
    """Return the top-level names of what a source imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_each_library_is_imported_in_its_places_only() -> None:
    strays = [
        f"{name} imports {library}; allowed: {', '.join(PLACES[library])}"
        for folder in ("flows", "pipelines", "models")
        for path in sorted((CHECKOUT / folder).rglob("*.py"))
        for name in [path.relative_to(CHECKOUT).as_posix()]
        for library in sorted(imported_libraries(path.read_text(encoding="utf-8")) & PLACES.keys())
        if not name.startswith(PLACES[library])
    ]
    assert strays == []


@pytest.mark.parametrize("packages", LIGHT)
def test_importing_a_package_loads_no_library_it_does_not_need(packages: str) -> None:
    command = [sys.executable, "-c", LOAD, packages, *LIGHT[packages]]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", f"importing {packages} loads {done.stdout.splitlines()[-1]}"
