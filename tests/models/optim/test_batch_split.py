"""Batches and engines that no set of processes can run are refused, by both configurations in the same words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from models.compression.paretoq import Config as Trained
from models.optim import batch_split
from pipelines.training.config import PretrainConfig

BAD: list[dict[str, Any]] = [
    {"batch_size": 10},
    {"world_size": 3, "micro_batch_size": 3},
    {"engine": "plain"},
    {"engine": "plain", "world_size": 1, "zero_stage": 3},
]


@pytest.mark.parametrize("batch", range(1, 25))
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 3), (4, 2)])
def test_a_batch_passes_only_if_every_rank_gets_whole_forward_passes(batch: int, world: int, micro: int) -> None:
    shares = [batch // world // micro for _ in range(world)]
    if sum(share * micro for share in shares) == batch:
        batch_split.refuse_uneven("batch_size", batch, world, micro)
    else:
        with pytest.raises(ValueError, match=f"batch_size = {batch} is not a multiple .* = {world * micro}; valid: "):
            batch_split.refuse_uneven("batch_size", batch, world, micro)


def test_the_plain_engine_is_one_process_and_deepspeed_may_be_any() -> None:
    batch_split.refuse_spread_plain("plain", 1, 0)
    batch_split.refuse_spread_plain("deepspeed", 8, 3)
    for world, stage in ((2, 0), (1, 1)):
        with pytest.raises(ValueError, match=f"world_size = {world} must be 1 and zero_stage = {stage} must be 0"):
            batch_split.refuse_spread_plain("plain", world, stage)


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_pretraining_and_compression_refuse_the_same_settings_with_the_same_words(changes: dict[str, Any]) -> None:
    said = []
    for config in (PretrainConfig, Trained):
        with pytest.raises(ValidationError) as refused:
            config.model_validate(changes)
        said.append([error["msg"] for error in refused.value.errors()])
    assert said[0] == said[1]
