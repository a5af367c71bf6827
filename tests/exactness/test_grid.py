"""The full grid: 1, 2, 3 and 4 ranks, all ZeRO stages, all optimizers, every option by itself (`make exactness`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from models.optim import lisa

pytestmark = [pytest.mark.exactness, pytest.mark.timeout(3600)]

RATES = {"lamb": 0.02, "lars": 0.02, "adamw": 0.003}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip": 0.3},
    "engine-clip": {"clip": 0.3, "clip_by": "engine"},
    "accumulation": {"accumulation": 4},
    "groups": {"groups": True},
    "tied": {"tied": True},
    "offload": {"offload": True},
    "lisa": {"interval": 4, "lisa": {"seed": 3, "layers": 1}},
    "lisa-groups": {"interval": 4, "lisa": {"seed": 5, "layers": 2}, "layer_groups": True, "clip": 0.3},
    "lisa-offload": {"interval": 4, "lisa": {"seed": 3, "layers": 1}, "offload": True},
    "lisa-tied-accumulation": {"interval": 4, "lisa": {"seed": 3, "layers": 1}, "tied": True, "accumulation": 4},
}


def cases(stage: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{optimizer}-{name}",
            "steps": 20,
            "weight_decay": 0.1,
            "optimizer": optimizer,
            "lr": lr,
            "stage": stage,
            **options,
        }
        for optimizer, lr in RATES.items()
        for name, options in OPTIONS.items()
        if stage or not options.get("offload")
    ]


@pytest.fixture(scope="module")
def plain(reference: ModuleType) -> Any:
    """Return a function that trains a case in one process; remembered, since stages and ranks share it."""
    results: dict[str, Any] = {}

    def run(case: dict[str, Any]) -> Any:
        if case["id"] not in results:
            given = dict(case)
            if "lisa" in case:
                names = [name for name, _ in reference.build(tied=case.get("tied", False)).named_parameters()]
                chosen = [
                    lisa.draw(case["lisa"]["seed"], number, reference.LAYERS, case["lisa"]["layers"])
                    for number in range(5)
                ]
                given["active"] = [lisa.active_names(names, layers) for layers in chosen]
            results[case["id"]] = reference.plain_run(given)
        return results[case["id"]]

    return run


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_option_is_exact(world: int, stage: int, launch: Any, plain: Any, reference: ModuleType) -> None:
    outcomes = launch(world, cases(stage))
    wrong = []
    for case in cases(stage):
        outcome, expected = outcomes[case["id"]], plain(case)
        masters = outcome.masters()
        difference = max(
            float((masters[name].double() - weight.double().flatten()).abs().max())
            for name, weight in expected["weights"].items()
            if not name.endswith(reference.KEY_BIAS)
        )
        if not difference < 1e-5:
            wrong.append(f"{case['id']}: weights differ by {difference:.1e}")
        for rank in outcome.ranks:
            if not all(torch.equal(rank.live[name].flatten(), masters[name]) for name in masters):
                wrong.append(f"{case['id']}: live weights are not the masters")
            if expected["ratios"] and rank.facts["ratios"] != pytest.approx(expected["ratios"], rel=1e-6):
                wrong.append(f"{case['id']}: trust ratios differ")
            if "lisa" in case and rank.facts["state_bytes"] != rank.facts["active_bytes"]:
                wrong.append(f"{case['id']}: moments of frozen fragments")
        for number, active in enumerate(outcome.ranks[0].facts["active"]):
            if {tensor for rank in outcome.ranks for tensor in rank.facts["moved"][number]} != set(active):
                wrong.append(f"{case['id']}: moved tensors are not the active ones in interval {number}")
    assert wrong == []
