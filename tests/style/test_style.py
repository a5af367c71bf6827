"""Ceilings and rules that no linter has: lengths, the top level, nothing that runs code found in data."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = ("flows", "pipelines", "models")
# Lengths are a smell, not a target: below these ceilings what reads best wins. Complexity (10) is ruff's.
FILE_LINES = 500
FUNCTION_LINES = 100
AGREED = {
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "data.dvc",
    "ingot.toml",
    "docs",
    "flows",
    "infra",
    "models",
    "pipelines",
    "pyproject.toml",
    "tests",
}
UNSAFE = re.compile(
    r"weights_only=False|\bpickle\.\w|import pickle|from pickle|cloudpickle|\bdill\b|joblib\.load|\bshelve\b"
    r"|torch\.load\(|yaml\.(unsafe_|full_)?load\(|yaml\.(Unsafe|Full)?Loader\b|trust_remote_code=True"
    r"|(?<![\w.])(eval|exec)\(|allow_pickle=True|shell=True|os\.(system|popen)\("
)
ARCHIVES = re.compile(r"import (tarfile|zipfile)|from (tarfile|zipfile)|unpack_archive|extractall")
"""Nothing is unpacked: a format that comes as an archive needs one place that refuses what leads out of its folder."""


def sources() -> Iterator[tuple[str, str]]:
    """Yield name and text of every source file of the product."""
    for folder in SOURCES:
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            yield str(path.relative_to(CHECKOUT)), path.read_text(encoding="utf-8")


def too_long_files(files: Iterator[tuple[str, str]]) -> list[str]:
    """Return the files over the ceiling, with their length."""
    lengths = {name: len(text.splitlines()) for name, text in files}
    return [f"{name}: {length}" for name, length in lengths.items() if length > FILE_LINES]


def too_long_functions(files: Iterator[tuple[str, str]]) -> list[str]:
    """Return the functions over the ceiling, with their length; signature and docstring count."""
    return [
        f"{name}:{node.lineno} {node.name}: {(node.end_lineno or node.lineno) - node.lineno + 1}"
        for name, text in files
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES
    ]


def test_no_file_passes_the_ceiling() -> None:
    assert too_long_files(sources()) == []


def test_no_function_passes_the_ceiling() -> None:
    assert too_long_functions(sources()) == []


def test_the_ceilings_notice_what_passes_them() -> None:
    body = "def long() -> None:\n" + "    x = 1\n" * FUNCTION_LINES
    assert too_long_functions(iter([("a.py", body)])) == [f"a.py:1 long: {FUNCTION_LINES + 1}"]
    assert too_long_files(iter([("b.py", "x = 1\n" * (FILE_LINES + 1))])) == [f"b.py: {FILE_LINES + 1}"]


def test_the_top_level_holds_nothing_but_the_agreed_names() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= AGREED


def test_no_tracked_file_names_the_host_of_a_package_registry() -> None:
    """Packages are named, and where they come from is pip's own configuration."""
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "registry.npmjs" + ".org")
    patterns = [argument for host in hosts for argument in ("-e", host)]
    found = subprocess.run(["git", "grep", "-nIF", *patterns], cwd=CHECKOUT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")


def test_no_source_runs_code_found_in_data() -> None:
    unsafe = [
        f"{name}: {line.strip()}"
        for name, text in sources()
        for line in text.splitlines()
        if UNSAFE.search(line) and not line.lstrip().startswith("#")
    ]
    assert unsafe == []


def test_no_archive_is_unpacked() -> None:
    assert [name for name, text in sources() if ARCHIVES.search(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p, weights_only=False)",
        "torch.load(p)",
        "pickle.load(f)",
        "import pickle",
        "np.load(p, allow_pickle=True)",
        "yaml.unsafe_load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "x = eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_unsafe_calls_are_recognised(line: str) -> None:
    assert UNSAFE.search(line)
