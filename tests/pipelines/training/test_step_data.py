"""Which documents a step saw: what the ranks were really given, at any number of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from models.objectives import causal
from models.objectives.base import ObjectiveContext
from pipelines.core.errors import ConfigError
from pipelines.data import packing, shards
from pipelines.training import step_data
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.phases import mixes_of, phases_of
from pipelines.training.rollbacks import Rollback

LENGTH = 16
TEXTS = [[10 + number] * (3 + number * 7 % 40) for number in range(50)]
"""Each document is one token over and over: what a batch holds tells which documents it is of."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    blocks = packing.best_fit(TEXTS, LENGTH, bos_id=0, eos_id=1, pad_id=2)
    entries = shards.write(blocks, folder, "train", sequence_length=LENGTH, dtype="uint16", shard_bytes=10 * LENGTH * 2)
    index = {"format": 1, "dtype": "uint16", "sequence_length": LENGTH, "splits": {"train": {"shards": entries}}}
    count = sum(entry["sequences"] for entry in entries)
    halves = [{"source": "a", "sequences": count // 2}, {"source": "b", "sequences": count - count // 2}]
    index["splits"]["train"]["sources"] = halves
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "documents").mkdir()
    lines = [{"id": f"d{n}", "text": "x", "source": f"s{n % 2}", "license": "", "work": ""} for n in range(len(TEXTS))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "documents" / "train.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    return folder


CHANGES: list[dict[str, Any]] = [
    {},
    {"phases": [{"steps": 3, "batch_size": 8, "sequence_length": 8}, {"steps": 3, "batch_size": 4}]},
    {"mixture": {"weights": {"a": 1.0, "b": 3.0}}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=["whole", "phases", "mixture"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_documents_are_those_that_the_ranks_were_given(
    changes: dict[str, Any], world: int, prepared: Path, tiny_settings: dict[str, Any]
) -> None:
    base = {
        key: value
        for key, value in tiny_settings.items()
        if "phases" not in changes or key not in ("steps", "batch_size")
    }
    config = PretrainConfig.model_validate({**base, **changes, "world_size": world})
    rollbacks = [Rollback(2, 3, 8, "m", "r")]
    reader = shards.ShardReader(prepared, "train")
    objective = causal.Objective(ObjectiveContext(0, 100, 0, 1, 2, 3), causal.Objective.Config())
    ranks, mixes = Ranks(0, world, torch.device("cpu")), mixes_of(config, reader.index)
    loader = DataLoader(reader, reader, objective, ranks, config.seed, phases_of(config), 2, 2, mixes)
    for step in range(1, config.steps + 1):
        digest, shown = step_data.documents_of(config, prepared, step, rollbacks)
        assert digest == loader.digest(step - 1, rollbacks)
        for rank in range(world):
            own = dataclasses.replace(loader, ranks=Ranks(rank, world, torch.device("cpu")))
            given = np.concatenate([batch.inputs_BT.numpy() for batch in own.batches(step - 1, rollbacks)])
            tokens = set(np.unique(given).tolist()) - {0, 1, 2}
            told = {int(part.id[1:]) for part in shown if part.rank == rank}
            assert {token - 10 for token in tokens} <= told
            for part in (part for part in shown if part.rank == rank):
                number, row = int(part.id[1:]), reader[part.sequence]
                assert row[part.first] == [0, *TEXTS[number], 1][part.token]
                assert part.source == f"s{number % 2}"


def test_at_another_number_of_ranks_it_is_the_same_batch(prepared: Path, tiny_settings: dict[str, Any]) -> None:
    config = PretrainConfig.model_validate({**tiny_settings, "world_size": 1})
    found = {world: step_data.documents_of(config, prepared, 2, world=world) for world in (1, 2, 4)}
    assert len({digest for digest, _ in found.values()}) == 1
    places = [sorted((p.sequence, p.first, p.id) for p in shown) for _, shown in found.values()]
    assert places[0] == places[1] == places[2]
    assert {p.rank for p in found[4][1]} == {0, 1, 2, 3}
    assert step_data.documents_of(config, prepared, 3)[0] != found[1][0]


def test_what_is_no_step_or_does_not_split_is_refused(prepared: Path, tiny_settings: dict[str, Any]) -> None:
    config = PretrainConfig.model_validate({**tiny_settings, "world_size": 1})
    with pytest.raises(ConfigError, match="step 7 is none of this training"):
        step_data.documents_of(config, prepared, 7)
    with pytest.raises(ConfigError, match="does not split over 3 ranks"):
        step_data.documents_of(config, prepared, 1, world=3)
