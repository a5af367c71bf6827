"""The import closure: which files count, and that every change of one of them is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core import source_closure

FILES = {
    "pipelines/__init__.py": "",
    "pipelines/work/__init__.py": "",
    "pipelines/work/stage.py": """
from typing import TYPE_CHECKING
from models.optim import native
if TYPE_CHECKING:
    from pipelines.work import only_typed
WORKER = "pipelines.work.worker"
def run():
    import importlib
    from pipelines.work.late import x
    importlib.import_module(f"models.kinds.{x}")
""",
    "pipelines/work/late.py": "x = 1",
    "pipelines/work/worker.py": """
import pkgutil
from pipelines.work import probes
pkgutil.iter_modules(probes.__path__)
""",
    "pipelines/work/probes/__init__.py": "",
    "pipelines/work/probes/one.py": "FACTORY = 'models.named:make'",
    "pipelines/work/only_typed.py": "",
    "models/__init__.py": "",
    "models/optim/__init__.py": "",
    "models/optim/native.py": "",
    "models/optim/native.cpp": "int x;",
    "models/kinds/first.py": "",
    "models/named.py": "",
    "models/unused.py": "",
}
UNUSED = {"pipelines/work/only_typed.py", "models/unused.py"}
ENTRY = "pipelines.work.stage:run"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of these files."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(checkout: Path) -> str:
    """As a new process computes it."""
    source_closure.digest.cache_clear()
    source_closure._facts.cache_clear()
    return source_closure.digest(ENTRY, checkout)


def test_imports_at_any_depth_import_strings_members_and_native_sources_count(checkout: Path) -> None:
    found = {path.relative_to(checkout).as_posix() for path in source_closure.files(ENTRY, checkout)}
    # A package that finds its members by file name counts whole, with the packages above it.
    assert found - UNUSED == set(FILES) - UNUSED
    assert "models/unused.py" not in found


def test_a_change_of_any_source_is_seen_and_of_any_other_file_is_not(checkout: Path) -> None:
    seen = [digest(checkout)]
    for name in sorted(set(FILES) - UNUSED):
        (checkout / name).write_text(FILES[name] + "\n")
        seen.append(digest(checkout))
    assert len(set(seen)) == len(seen)
    (checkout / "models" / "unused.py").write_text("x = 2")
    (checkout / "models" / "optim" / "notes.md").write_text("text")
    assert digest(checkout) == seen[-1]


def test_files_are_parsed_once_while_they_stay_as_they_are(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "pipelines" / "core").mkdir()
    first = digest(checkout)
    monkeypatch.setattr(source_closure, "_imports", lambda _tree: pytest.fail("parsed again"))
    assert digest(checkout) == first


def test_an_entry_that_is_not_ours_has_no_sources(checkout: Path) -> None:
    assert source_closure.files("none:none", checkout) == []
