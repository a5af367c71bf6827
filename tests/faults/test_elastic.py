"""Resuming under another number of ranks and another ZeRO stage, by changing a setting of the same command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow
full = pytest.mark.faults_full


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"world_size": 1}, id="two ranks to one"),
        pytest.param({"zero_stage": 3}, id="ZeRO-2 to ZeRO-3"),
        pytest.param({"offload": True}, id="into the CPU's memory", marks=full),
        pytest.param({"threads": 2}, id="one thread to two", marks=full),
        pytest.param({"world_size": 4}, id="two ranks to four", marks=full),
        pytest.param({"world_size": 4, "zero_stage": 1}, id="four ranks and ZeRO-1", marks=full),
    ],
)
def test_a_run_goes_on_under_another_sharding(killed_at_7: Any, uninterrupted: Any, changes: dict[str, Any]) -> None:
    finished = killed_at_7.finish(**changes)
    assert finished.resumed_at == [5]
    assert finished.steps == uninterrupted.steps
    losses, expected = ([float.fromhex(loss) for loss in each.losses] for each in (finished, uninterrupted))
    assert losses[:5] == expected[:5]
    assert losses == pytest.approx(expected, rel=1e-6)


@full
def test_from_four_ranks_to_two(pretraining: Callable[..., Any], uninterrupted: Any) -> None:
    run = pretraining()
    kill = {"point": "train.after_step", "rank": 3, "step": 7, "action": "SIGKILL"}
    assert run.attempt(faults=[kill], world_size=4, zero_stage=3).code == 4
    finished = run.finish()
    assert finished.resumed_at == [5]
    losses, expected = ([float.fromhex(loss) for loss in each.losses] for each in (finished, uninterrupted))
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_split_that_does_not_work_out_is_refused_by_the_settings(pretraining: Callable[..., Any]) -> None:
    from pydantic import ValidationError

    from pipelines.training.config import PretrainConfig

    with pytest.raises(ValidationError, match=r"batch_size = 8 is not a multiple of .* 3 x 2 = 6; valid: 6, 12, 18"):
        PretrainConfig.model_validate({**pretraining().config, "world_size": 3})
