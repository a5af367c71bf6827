"""Resuming under another number of ranks and another ZeRO stage, by changing a setting of the same command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes", [{"world_size": 1}, {"zero_stage": 3}], ids=["two ranks to one", "ZeRO-2 to ZeRO-3"]
)
def test_a_run_goes_on_under_another_sharding(killed_at_7: Any, uninterrupted: Any, changes: dict[str, Any]) -> None:
    finished = killed_at_7.finish(**changes)
    assert finished.resumed_at == [5]
    assert finished.steps == uninterrupted.steps
    losses, expected = ([float.fromhex(loss) for loss in each.losses] for each in (finished, uninterrupted))
    assert losses[:5] == expected[:5]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_split_that_does_not_work_out_is_refused_by_the_settings(pretraining: Callable[..., Any]) -> None:
    from pydantic import ValidationError

    from pipelines.training.config import PretrainConfig

    with pytest.raises(ValidationError, match=r"batch_size = 8 is not a multiple of .* 3 x 2 = 6; valid: 6, 12, 18"):
        PretrainConfig.model_validate({**pretraining().config, "world_size": 3})
