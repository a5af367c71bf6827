"""Promotion cut off at every point, and two at once: one version a model, one champion, one line of history."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifact import Artifact
from pipelines.faults import InjectedFaultError
from pipelines.registry import champions

WORKER = Path(__file__).parent / "promote_once.py"
LIMIT_S = 240.0


def start(world: Any, name: str, inputs: Mapping[str, Artifact], fault: str | None = None) -> subprocess.Popen[str]:
    """Start a promotion in a process of its own; `fault` is the point where it kills itself."""
    folder = world.root.parent / name
    folder.mkdir()
    job = {"store": str(world.root), "out": str(folder), "inputs": {k: str(a.path) for k, a in inputs.items()}}
    (folder / "job.json").write_text(json.dumps(job))
    environment = dict(os.environ)
    if fault is not None:
        (folder / "faults.json").write_text(json.dumps([{"point": fault, "action": "SIGKILL"}]))
        environment["INGOT_FAULTS"] = str(folder / "faults.json")
    command = [sys.executable, str(WORKER), str(folder / "job.json")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def versions(world: Any) -> list[Any]:
    """Return all registered versions."""
    return list(world.client().search_model_versions("name = 'ingot'"))


def aliases(world: Any) -> dict[str, str]:
    """Return alias -> version."""
    return {alias: str(number) for alias, number in world.client().get_registered_model("ingot").aliases.items()}


def check_completed(world: Any, better: Mapping[str, Artifact]) -> None:
    """Check that the second of two promotions is complete, and nothing more than that is there."""
    prints = [version.tags["fingerprint"] for version in versions(world)]
    assert len(prints) == len(set(prints)) == 2
    champion = world.client().get_model_version_by_alias("ingot", "champion")
    assert champion.tags["fingerprint"] == better["model:pretrain"].manifest.fingerprint
    assert aliases(world) == {"champion": str(champion.version)}
    assert [record["version"] for record in champions.line(world.root, "ingot")] == ["1", str(champion.version)]


@pytest.mark.parametrize("point", ["after_upload", "after_version", "after_fetch", "before_alias", "after_alias"])
def test_a_promotion_that_breaks_anywhere_is_completed_by_the_next(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    world.promote(world.candidate(2.0))
    better = world.candidate(1.9, seed=1)
    plan = tmp_path / "faults.json"
    plan.write_text(json.dumps([{"point": f"promote.{point}", "action": "raise"}]))
    monkeypatch.setenv("INGOT_FAULTS", str(plan))
    with pytest.raises(InjectedFaultError, match=point):
        world.promote(better)
    world.promote(better)
    check_completed(world, better)


@pytest.mark.slow
def test_a_promotion_killed_between_version_and_alias_is_completed_by_the_next(world: Any) -> None:
    world.promote(world.candidate(2.0))
    better = world.candidate(1.9, seed=1)
    killed = start(world, "killed", better, "promote.after_version")
    _, errors = killed.communicate(timeout=LIMIT_S)
    assert killed.returncode == -signal.SIGKILL, errors
    assert aliases(world) == {"champion": "1"}
    world.promote(better)
    check_completed(world, better)


@pytest.mark.slow
def test_two_promotions_at_once_leave_one_champion(world: Any) -> None:
    world.promote(world.candidate(2.0))
    good, best = world.candidate(1.9, seed=1), world.candidate(1.8, seed=2)
    runs = [start(world, "good", good), start(world, "best", best)]
    codes = []
    for run in runs:
        _, errors = run.communicate(timeout=LIMIT_S)
        codes.append(run.returncode)
        assert run.returncode in {0, 7}, errors
    assert codes[1] == 0
    champion = world.client().get_model_version_by_alias("ingot", "champion")
    assert champion.tags["fingerprint"] == best["model:pretrain"].manifest.fingerprint
    assert aliases(world) == {"champion": str(champion.version)}
    assert len(versions(world)) == (3 if codes[0] == 0 else 2)
    standing = champions.champion(world.root, "ingot")
    assert standing is not None
    assert standing["version"] == str(champion.version)
