"""Promotion cut off at every point, and two at once: one version a model, one champion, one line of history."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.errors import GateRefused
from pipelines.core.fault_injection import InjectedFaultError
from pipelines.registry import history, registry
from pipelines.registry.registry import Registry

LIMIT_S = 240.0


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
    assert [record["version"] for record in history.champions(world.root, "ingot")] == ["1", str(champion.version)]


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


class Cut(BaseException):
    """The end of the process, as far as one process can show it: nothing of ours catches it."""


def cut_at(patch: pytest.MonkeyPatch, number: int, *, after: bool) -> None:
    """Let the call `number` to MLflow, counted from 0, be the last: it is not made, or made and never answered."""
    from mlflow import MlflowClient

    calls = iter(range(10_000))
    depth = [0]

    def counted(name: str, original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if depth[0]:  # MLflow calling itself
                return original(self, *args, **kwargs)
            last = next(calls) == number
            if last and not after:
                raise Cut(name)
            depth[0] += 1
            try:
                return original(self, *args, **kwargs)
            finally:
                depth[0] -= 1
                if last:
                    raise Cut(name)

        return call

    for name, original in list(vars(MlflowClient).items()):
        if callable(original) and not name.startswith("_"):
            patch.setattr(MlflowClient, name, counted(name, original))
    patch.setattr(registry, "upload", counted("upload", registry.upload))  # files go past the client


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_promotion_cut_at_every_call_to_the_registry_is_completed_by_the_next(world: Any, after: bool) -> None:
    """Each round promotes a better model, is cut one call later than the round before, and is repeated."""
    world.promote(world.candidate(2.0))
    prints = [world.client().get_model_version("ingot", "1").tags["fingerprint"]]
    cuts: list[str] = []
    for number in range(60):
        better = world.candidate(1.9 - number / 100, seed=number + 1)
        prints.append(better["model:pretrain"].manifest.fingerprint)
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, number, after=after)
            try:
                world.promote(better)
            except Cut as cut:
                cuts.append(str(cut))
        world.promote(better)
        champion = world.client().get_model_version_by_alias("ingot", "champion")
        assert champion.tags["fingerprint"] == prints[-1], cuts
        assert aliases(world) == {"champion": str(champion.version)}, cuts
        if len(cuts) <= number:
            break
    assert sorted(v.tags["fingerprint"] for v in versions(world)) == sorted(prints), "one version a model"
    line = [record["fingerprint"] for record in history.champions(world.root, "ingot")]
    assert line == prints, "one line of history a champion"
    changes = {"create_model_version", "set_model_version_tag", "set_registered_model_alias", "upload"}
    assert changes | {"delete_registered_model_alias", "create_run"} <= set(cuts)


def test_a_champion_that_took_over_meanwhile_is_met_by_a_new_decision(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a lease that both hold (two stores on one server) the title may move between decision and alias."""
    world.promote(world.candidate(2.0))
    best, good = world.candidate(1.8, seed=1), world.candidate(1.9, seed=2)
    world.promote(best)
    client = world.client()
    client.set_registered_model_alias("ingot", "champion", "1")
    promote = Registry.promote

    def overtaken(self: Registry, *args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(Registry, "promote", promote)
        client.set_registered_model_alias("ingot", "champion", "2")
        return promote(self, *args, **kwargs)

    monkeypatch.setattr(Registry, "promote", overtaken)
    with pytest.raises(GateRefused, match="champion v2"):
        world.promote(good)
    assert aliases(world) == {"champion": "2"}
    assert world.promote(world.candidate(1.7, seed=3))["version"] == "4"


def test_stores_that_share_a_registry_see_each_others_champions(world: Any, second_world: Any) -> None:
    world.promote(world.candidate(2.0))
    with pytest.raises(GateRefused, match="champion v1"):
        second_world.promote(second_world.candidate(2.1, seed=1))
    assert second_world.promote(second_world.candidate(1.9, seed=2))["version"] == "2"
    with pytest.raises(GateRefused, match="champion v2"):
        world.promote(world.candidate(1.95, seed=3))
    seen = history.champion(world.root, "ingot")
    assert seen is not None
    assert (seen["version"], seen["action"]) == ("2", history.OBSERVED)
    made = history.champion(second_world.root, "ingot")
    assert made is not None
    assert seen["why"] == f"alias found moved; {made['who']} at {made['time']}: {made['why']}"


@pytest.mark.slow
def test_two_promotions_at_once_from_two_stores_leave_the_better_champion(world: Any, second_world: Any) -> None:
    world.promote(world.candidate(2.0))
    good, best = world.candidate(1.9, seed=1), second_world.candidate(1.8, seed=2)
    runs = [second_world.start_promotion("best", best), world.start_promotion("good", good)]
    for run in runs:
        _, errors = run.communicate(timeout=LIMIT_S)
        assert run.returncode in {0, 7}, errors
    assert runs[0].returncode == 0
    champion = world.client().get_model_version_by_alias("ingot", "champion")
    assert champion.tags["fingerprint"] == best["model:pretrain"].manifest.fingerprint
    assert aliases(world) == {"champion": str(champion.version)}


@pytest.mark.slow
def test_a_promotion_killed_between_version_and_alias_is_completed_by_the_next(world: Any) -> None:
    world.promote(world.candidate(2.0))
    better = world.candidate(1.9, seed=1)
    killed = world.start_promotion("killed", better, "promote.after_version")
    _, errors = killed.communicate(timeout=LIMIT_S)
    assert killed.returncode == -signal.SIGKILL, errors
    assert aliases(world) == {"champion": "1"}
    world.promote(better)
    check_completed(world, better)


@pytest.mark.slow
def test_two_promotions_at_once_leave_one_champion(world: Any) -> None:
    world.promote(world.candidate(2.0))
    good, best = world.candidate(1.9, seed=1), world.candidate(1.8, seed=2)
    runs = [world.start_promotion("good", good), world.start_promotion("best", best)]
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
    standing = history.champion(world.root, "ingot")
    assert standing is not None
    assert standing["version"] == str(champion.version)
