"""Which code this is: named by commit or version, and found by other processes wherever they start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.core import program


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("x = 1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_named_by_its_commit(checkout: Path) -> None:
    assert program.commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_changed_tracked_file_shows(checkout: Path) -> None:
    (checkout / "code.py").write_text("x = 2")
    assert program.commit(checkout) == git(checkout, "rev-parse", "HEAD") + "+dirty"


def test_an_untracked_file_does_not(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("hello")
    assert program.commit(checkout) == git(checkout, "rev-parse", "HEAD")


INSTALLED = f"ingot-{program.version()} (installed)"


def test_outside_git_the_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert program.commit(tmp_path) == INSTALLED


def test_without_git_the_version_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert program.commit(checkout) == INSTALLED


def test_a_repository_around_an_installation_is_not_its_commit(checkout: Path) -> None:
    """As when a project has a virtual environment in it."""
    (checkout / ".venv" / "site-packages").mkdir(parents=True)
    (checkout / ".venv" / "site-packages" / "code.py").write_text("x = 1")
    assert program.commit(checkout / ".venv" / "site-packages") == INSTALLED


def test_a_folder_of_the_user_never_takes_the_place_of_our_code(tmp_path: Path) -> None:
    for package in ("models", "pipelines"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the code of the user')")
    asked = program.command("pipelines.core.run_stage")
    done = subprocess.run(asked, cwd=tmp_path, env=program.environment(), capture_output=True, text=True)
    assert (done.returncode, "takes one argument" in done.stderr) == (2, True), done.stderr
