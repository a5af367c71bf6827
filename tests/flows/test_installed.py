"""The program as pip installs it: all of its files are there, and it works from any folder and says its version."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core import program

PACKAGES = ("flows", "models", "pipelines")


def tracked() -> list[str]:
    command = ["git", "ls-files", *PACKAGES, "pyproject.toml", "README.md", "LICENSE"]
    done = subprocess.run(command, cwd=program.ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (program.ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installation that was built from nothing but tracked files, without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(program.ROOT / name, source / name)
    target = tmp_path_factory.mktemp("site packages, 100%")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def environment(installed: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "INGOT_"))}
    return {**kept, "PYTHONPATH": str(installed)}


def ingot(installed: Path, where: Path, *arguments: str) -> str:
    command = [sys.executable, "-P", "-m", "flows.cli", *arguments]
    done = subprocess.run(command, cwd=where, env=environment(installed), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_file_of_the_packages_is_installed(installed: Path) -> None:
    wanted = [name for name in tracked() if name.partition("/")[0] in PACKAGES]
    assert [name for name in wanted if not (installed / name).is_file()] == []
    assert not (installed / "tests").exists()


@pytest.mark.slow
def test_it_makes_and_plans_a_project_and_names_its_version(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text number {number}.")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('the code of the user')")
    assert "mine has no champion yet" in ingot(installed, tmp_path, "new", "mine", "--data", "texts")
    assert json.loads(ingot(installed, tmp_path / "mine", "plan", "--json"))
    code = "from pipelines.core import program; print(program.commit(), program.ROOT, sep='\\n')"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"ingot-{program.version()} (installed)", str(installed)]
