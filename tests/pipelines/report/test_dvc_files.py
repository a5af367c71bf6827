"""The two files for DVC: what its own commands make of them, and that only results are in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flows.commands import new
from pipelines.core.artifact import Artifact
from pipelines.report import dvc_files


def dvc(folder: Path, *arguments: str) -> str:
    call = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True).stdout


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@e.org", *arguments], cwd=folder, check=True)


def test_dvc_compares_the_numbers_of_two_revisions(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    for name in ("dvc.yaml", ".dvc/config", ".dvc/.gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(new.FILES[name])
    dvc_files.write(artifacts, tmp_path / "results")
    table = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert set(table) == {"prepare", "pretrain", "evaluate.pretrain", "compress.<b>int4", "evaluate.<b>int4"}
    curve = (tmp_path / "results" / "training.csv").read_text().splitlines()
    assert [curve[0], curve[1], curve[-1]] == ["step,tokens,loss,validation_loss", "1,,6.9,", "5,,6.5,6.6"]
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "-m", "first")

    table["evaluate.pretrain"]["bits_per_byte"] = 1.5
    (tmp_path / "results" / "metrics.json").write_text(json.dumps(table))
    changed = json.loads(dvc(tmp_path, "metrics", "diff", "--json"))
    assert changed["results/metrics.json"]["evaluate.pretrain.bits_per_byte"]["new"] == 1.5
    shown = dvc(tmp_path, "plots", "show", "--json")
    assert "validation_loss" in shown


def test_files_that_would_not_change_are_left_alone(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    dvc_files.write(artifacts, tmp_path)
    before = [(tmp_path / name).stat().st_mtime_ns for name in (dvc_files.METRICS, dvc_files.CURVE)]
    dvc_files.write(artifacts, tmp_path)
    assert before == [(tmp_path / name).stat().st_mtime_ns for name in (dvc_files.METRICS, dvc_files.CURVE)]
