"""The style of the code as numbers that may not get worse, and rules that no linter has."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded.json")
LOWER_IS_BETTER = (
    "file_median", "file_p90", "file_max", "function_median", "function_p95", "function_max",
)  # fmt: skip
HIGHER_IS_BETTER = ("annotated_percent", "public_docstring_percent", "module_docstring_percent", "tests_per_source")
BAR = {
    "file_median": 120, "file_max": 450, "function_median": 9, "function_p95": 45, "function_max": 90,
    "annotated_percent": 100.0, "public_docstring_percent": 90.0, "module_docstring_percent": 100.0,
}  # fmt: skip
UNSAFE = re.compile(
    r"weights_only=False|pickle\.loads?\(|yaml\.load\(|trust_remote_code=True|(?<![\w.])eval\(|allow_pickle=True"
)


@pytest.fixture(scope="module")
def row() -> dict[str, float]:
    """Our row of the table, as the tree is now."""
    spec = importlib.util.spec_from_file_location("measure", Path(__file__).with_name("measure.py"))
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, float] = module.measure()
    print(json.dumps(found))
    return found


@pytest.mark.parametrize("name", LOWER_IS_BETTER)
def test_lengths_do_not_grow_beyond_what_is_recorded(row: dict[str, float], name: str) -> None:
    assert row[name] <= json.loads(RECORDED.read_text())[name]


@pytest.mark.parametrize("name", HIGHER_IS_BETTER)
def test_coverage_of_words_and_tests_does_not_fall(row: dict[str, float], name: str) -> None:
    assert row[name] >= json.loads(RECORDED.read_text())[name]


@pytest.mark.parametrize("name", BAR)
def test_the_row_stays_within_the_bar(row: dict[str, float], name: str) -> None:
    assert row[name] <= BAR[name] if name in LOWER_IS_BETTER else row[name] >= BAR[name]


def test_the_top_level_holds_nothing_but_the_agreed_names() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    agreed = {
        "pyproject.toml",
        "flows",
        "pipelines",
        "models",
        "data.dvc",
        "infra",
        "tests",
        "README.md",
        "Makefile",
        "LICENSE",
    }
    assert visible <= agreed


def test_no_source_opens_a_door_to_code_in_data() -> None:
    found = [
        f"{path.relative_to(CHECKOUT)}: {line.strip()}"
        for folder in ("flows", "pipelines", "models")
        for path in (CHECKOUT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if UNSAFE.search(line) and not line.lstrip().startswith("#")
    ]
    assert found == []
