"""Phases: batch, length and rate of every step; samples without gap or repetition; exact resume in each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.objectives import causal, masked
from models.objectives.base import ObjectiveContext
from pipelines.core.errors import ConfigError
from pipelines.training import memory, phases
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.optimizers import learning_rate
from pipelines.training.worker_spec import WorkerSpec

Run = Callable[..., int]
PLAIN: dict[str, Any] = {"engine": "plain", "world_size": 1, "zero_stage": 0, "micro_batch_size": 2}
TWO: list[dict[str, Any]] = [
    {
        "steps": 10,
        "sequence_length": 6,
        "batch_size": 16,
        "batch_warmup": {"start": 4, "steps": 5},
        "schedule": {"warmup": 4, "decay": "polynomial"},
    },
    {"steps": 5, "batch_size": 8, "schedule": {"warmup": 2, "decay": "polynomial"}},
]


def settings(wanted: list[dict[str, Any]] | None = None, **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({**PLAIN, "phases": TWO if wanted is None else wanted, **changes})


@dataclass
class Numbers:
    """A split whose token at place p of sequence s is 4 + 24 s + p."""

    count: int
    sequence_length: int = 24

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Any) -> Any:
        return 4 + np.asarray(indices)[:, None] * self.sequence_length + np.arange(self.sequence_length)


CAUSAL = causal.Objective(ObjectiveContext(0, 500, 0, 1, 2, 3), causal.Objective.Config())


def loader(config: PretrainConfig, *, rank: int = 0, world: int = 1, objective: Any = None) -> DataLoader:
    return DataLoader(
        train=Numbers(7),
        validation=Numbers(3),
        objective=objective or CAUSAL,
        ranks=Ranks(rank, world, torch.device("cpu")),
        seed=config.seed,
        phases=phases.phases_of(config),
        micro_batch_size=config.micro_batch_size,
        validation_sequences=3,
    )


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_a_run_without_phases_is_one() -> None:
    config = PretrainConfig.model_validate({**PLAIN, "steps": 60, "batch_size": 4})
    (only,) = phases.phases_of(config)
    assert (only.first, only.end, only.batch(0), only.batch(59), only.sequence_length) == (0, 60, 4, 4, None)


def test_steps_and_batch_of_the_run_follow_from_the_phases_and_survive_a_round_trip() -> None:
    config = settings()
    assert (config.steps, config.batch_size) == (15, 16)
    assert PretrainConfig.model_validate_json(config.model_dump_json()) == config


def test_every_step_belongs_to_one_phase() -> None:
    plan = phases.phases_of(settings())
    assert [phases.at(plan, step).number for step in range(17)] == [0] * 10 + [1] * 7


def test_the_batch_doubles_at_even_distances_and_then_stays() -> None:
    first = phases.phases_of(settings())[0]
    sizes = [first.batch(step) for step in range(10)]
    assert sizes == [4, 4, 8, 8, 8, 16, 16, 16, 16, 16]
    assert phases.doubling_batches(2, 16, 30) == ((0, 2), (10, 4), (20, 8), (30, 16))
    walked = [first.samples_before(step) for step in range(11)]
    assert walked == [sum(sizes[:step]) for step in range(11)]


def test_tokens_are_counted_by_length() -> None:
    plan = phases.phases_of(settings())
    assert phases.tokens_by_length(plan, 0, 24) == {6: 0, 24: 0}
    assert phases.tokens_by_length(plan, 3, 24) == {6: 16 * 6, 24: 0}
    assert phases.tokens_by_length(plan, 15, 24) == {6: 112 * 6, 24: 40 * 24}


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_the_second_phase_warms_up_again_and_each_decays_towards_zero() -> None:
    whole = [{**phase, "batch_warmup": None} for phase in TWO]
    rates = [learning_rate(settings(whole, optimizer={"lr": 0.8}), step) for step in range(15)]
    first = [0.2, 0.4, 0.6, 0.8, *(0.8 * (1 - done / 6) for done in range(6))]
    second = [0.4, 0.8, *(0.8 * (1 - done / 3) for done in range(3))]
    assert min(first + second) > 0
    assert rates == pytest.approx(first + second, abs=1e-12)


def test_the_rate_follows_the_square_root_of_the_batch_also_while_it_grows() -> None:
    scaling = {"base_batch": 4, "rule": "sqrt"}
    flat = {"warmup": 0, "decay": "constant"}
    grown = [{**phase, "schedule": flat} for phase in TWO]
    config = settings(grown, optimizer={"lr": 0.01, "lr_scaling": scaling})
    sizes = [4, 4, 8, 8, 8, 16, 16, 16, 16, 16, *[8] * 5]
    expected = [0.01 * math.sqrt(size / 4) for size in sizes]
    assert [learning_rate(config, step) for step in range(15)] == pytest.approx(expected, rel=1e-12)
    linear = settings(grown, optimizer={"lr": 0.01, "lr_scaling": {**scaling, "rule": "linear"}})
    assert learning_rate(linear, 9) == pytest.approx(0.04, rel=1e-12)


def test_a_rate_given_for_a_phase_is_taken_as_it_is() -> None:
    given = [TWO[0], {**TWO[1], "lr": 0.5, "schedule": {"warmup": 0, "decay": "constant"}}]
    config = settings(given, optimizer={"lr": 0.01, "lr_scaling": {"base_batch": 1}})
    assert learning_rate(config, 12) == 0.5


def test_equal_warmup_steps_are_epochs_in_proportion_to_the_batch() -> None:
    """The paper's table: 1/320 of the steps at a batch of 512 and 1/5 at 32,768, at equal samples."""
    samples = 512 * 1_000_000
    for batch, share in ((512, 1 / 320), (2048, 1 / 80), (8192, 1 / 20), (32_768, 1 / 5)):
        assert share * samples / batch == pytest.approx(3125, rel=1e-12)
    shared = settings([{"steps": 100, "batch_size": 8, "schedule": {"warmup_share": 0.2, "decay": "constant"}}])
    peak = shared.optimizer.peak_lr
    assert learning_rate(shared, 9) == pytest.approx(peak / 2)
    assert [learning_rate(shared, step) for step in (19, 20, 99)] == [peak] * 3


# ---- samples --------------------------------------------------------------------------------------------------------


def test_a_phase_of_short_sequences_shows_every_piece_once_an_epoch() -> None:
    config = settings([{**TWO[0], "batch_size": 4, "batch_warmup": None}])
    made = loader(config)
    shown = [batch.inputs_BT for step in range(7) for batch in made.batches(step)]
    rows = torch.cat(shown).tolist()
    assert sorted(row[0] for row in rows) == [4 + 6 * piece for piece in range(28)]
    assert all(row == list(range(row[0], row[0] + 6)) for row in rows)


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_shows_the_same_samples_at_every_step_of_every_phase(world: int) -> None:
    config = settings(micro_batch_size=1)
    for step in range(15):
        alone = torch.cat([batch.inputs_BT for batch in loader(config).batches(step)])
        parts = [
            torch.cat([b.inputs_BT for b in loader(config, rank=r, world=world).batches(step)]) for r in range(world)
        ]
        assert sorted(torch.cat(parts).tolist()) == sorted(alone.tolist())


def test_a_phase_repeats_neither_the_order_nor_the_masks_of_the_one_before() -> None:
    same = [{"steps": 3, "batch_size": 4, "schedule": {"warmup": 0}}] * 2
    config = settings(same, family="encoder")
    objective = masked.Objective(ObjectiveContext(0, 400, 0, 1, 2, 3), masked.MaskingConfig())
    made = loader(config, objective=objective)
    assert made.ids(0).tolist() != made.ids(3).tolist()
    hidden = {
        (row[0], tuple(targets))
        for step in range(6)
        for batch in made.batches(step)
        for row, targets in zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True)
    }
    assert len(hidden) == 24


def test_a_length_that_does_not_divide_the_packed_one_is_refused_with_those_that_do() -> None:
    odd = phases.phases_of(settings([{**TWO[0], "sequence_length": 7}]))[0]
    with pytest.raises(
        ConfigError, match=r"sequence_length = 7 does not divide prepare.sequence_length = 24"
    ) as caught:
        phases.chunks_a_sequence(odd, 24)
    assert caught.value.hint == "valid: 2, 3, 4, 6, 8, 12, 24"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 99}, "steps = 99, the phases make it 15"),
        ({"batch_size": 4}, "batch_size = 4, the phases make it 16"),
        ({"micro_batch_size": 3}, "batch_size = 16 is not a multiple of world_size x micro_batch_size = 1 x 3"),
        ({"micro_batch_size": 8}, r"phases.0.batch_warmup.start = 4 is not a multiple"),
    ],
)
def test_a_run_at_odds_with_its_phases_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**change)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"batch_warmup": {"start": 3, "steps": 5}}, "must be 2, 4, 8, ... times as large"),
        ({"batch_warmup": {"start": 16, "steps": 5}}, "must be 2, 4, 8, ... times as large"),
        ({"batch_warmup": {"start": 4, "steps": 10}}, "the phase has 10 steps"),
        ({"schedule": {"warmup": 10}}, r"phases.0.schedule.warmup = 10; of 10 steps, valid: 0 to 9"),
        ({"schedule": {"warmup_share": 0.99}}, r"phases.0.schedule.warmup = 10; of 10 steps"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings([{**TWO[0], **phase}, TWO[1]])


# ---- real runs ------------------------------------------------------------------------------------------------------


def test_a_run_of_two_phases_resumes_in_each_with_the_same_bytes(
    run_plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.core.errors import Preempted

    changes: dict[str, Any] = {
        "phases": [{**TWO[0], "steps": 6, "batch_warmup": {"start": 4, "steps": 4}}, {**TWO[1], "steps": 3}],
        "optimizer": {"lr_scaling": {"base_batch": 4}, "lr": 0.01},
        "schedule": {},
        "steps": 9,
        "batch_size": 16,
        "validate_every": 100,
        "checkpoint": {"every": 100},
    }
    assert run_plain(tmp_path / "whole", **changes) == 0
    for step in (3, 6, 7):
        faults = tmp_path / f"faults-{step}.json"
        faults.write_text(json.dumps([{"point": "train.after_step", "step": step, "action": "SIGTERM"}]))
        monkeypatch.setenv("INGOT_FAULTS", str(faults))
        folder = tmp_path / str(step)
        assert run_plain(folder, **changes) == Preempted.exit_code
        monkeypatch.delenv("INGOT_FAULTS")
        assert run_plain(folder, **changes) == 0
        for name in ("training.json", "model/model.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (step, name)
    facts = json.loads((tmp_path / "whole" / "training.json").read_text())
    positions = (2 * 4 + 2 * 8 + 2 * 16) * 6 + 3 * 8 * 24
    assert 0.9 * positions < facts["tokens"] < positions  # some are padding


SCALED = (
    "preset=0.5m", "model.width=32", "model.layers=2", "model.heads=2", "model.ffn_width=44", "precision=fp32",
    "engine=plain", "world_size=1", "zero_stage=0", "micro_batch_size=2", "validate_every=100", "checkpoint.every=100",
    "phases.0.steps=4", "phases.0.sequence_length=6", "phases.0.batch_size=8", "phases.0.batch_warmup.start=2",
    "phases.0.batch_warmup.steps=2", "phases.0.schedule.warmup=2", "phases.1.steps=3", "phases.1.sequence_length=24",
    "phases.1.batch_size=4", "phases.1.micro_batch_size=2", "phases.1.schedule.warmup=1",
    "optimizer.lr_scaling.base_batch=4",
)  # fmt: skip
"""A large-batch recipe, made to fit a test: everything else of it stays."""


@pytest.mark.parametrize("name", ["bert-lamb", "decoder-lamb"])
def test_a_large_batch_recipe_runs_when_it_is_scaled_down(name: str, run_plain: Run, tmp_path: Path) -> None:
    from flows import recipe

    config = recipe.resolve(name, [f"pretrain.{setting}" for setting in SCALED]).pretrain
    changes = config.model_dump(exclude={"engine", "world_size", "zero_stage"})
    assert run_plain(tmp_path, **changes) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record, positions in zip(records, [12, 36, 84, 132, 228, 324, 420], strict=True):
        assert 0.85 * positions < record["tokens"] <= positions  # some are padding
    rates = [record["lr"] for record in records]
    peak = config.optimizer.peak_lr
    assert rates[:3] == pytest.approx([peak / 2 * 0.5**0.5, peak, peak * 2**0.5], rel=1e-9)
    assert rates[4:] == pytest.approx([peak, peak, peak / 2], rel=1e-9)
    assert all(f"trust/{group}" in records[0] for group in ("layer.0", "layer.1"))


@pytest.mark.parametrize("name", ["bert-lamb", "decoder-lamb"])
def test_a_large_batch_recipe_is_the_schedule_of_the_paper(name: str) -> None:
    from flows import recipe

    config = recipe.resolve(name).pretrain
    short, long = phases.phases_of(config)
    assert config.optimizer.name == "lamb"
    assert short.sequence_length is not None
    assert long.sequence_length is not None
    assert long.sequence_length == 4 * short.sequence_length
    assert short.batch(0) < short.batch(short.steps - 1) > long.batch(0)
    warm_again = [long.learning_rate(step) for step in (0, long.schedule.warmup - 1, long.steps - 1)]
    assert warm_again[0] < warm_again[1] > 100 * warm_again[2] > 0
    ratio = short.batch(short.steps - 1) / long.batch(0)
    assert short.learning_rate(short.schedule.warmup - 1) == pytest.approx(warm_again[1] * ratio**0.5)


def test_a_job_with_a_length_that_does_not_fit_is_refused_before_it_starts(
    plain_spec: Callable[..., WorkerSpec], prepared: Any, tmp_path: Path
) -> None:
    from pipelines.core.compute import ComputeConfig
    from pipelines.core.stage import StageContext
    from pipelines.training.stage import make_worker_spec

    config = plain_spec(
        tmp_path, phases=[{**TWO[0], "sequence_length": 5}], schedule={}, steps=10, batch_size=16
    ).config
    with pytest.raises(ConfigError, match="sequence_length = 5 does not divide"):
        make_worker_spec(config, prepared, StageContext("pretrain", tmp_path, compute=ComputeConfig(device="cpu")))


def test_a_phase_masks_at_a_rate_of_its_own_and_validation_at_that_of_the_run() -> None:
    """As EuroBERT and Ettin end: fewer tokens masked in the last phase."""
    rates = [{"probability": 0.5}, {"probability": 0.1}, {}]
    wanted = settings(
        [{"steps": 4, "batch_size": 8, "objective_settings": each, "schedule": {"warmup": 0}} for each in rates],
        family="encoder",
        objective_settings={"probability": 0.3, "mask": 1.0, "random": 0.0},
    )
    context = ObjectiveContext(0, 500, 0, 1, 2, 3)
    kinds = [masked.Objective.Config.model_validate(wanted.objective_settings_of(n)) for n in range(3)]
    assert [(kind.probability, kind.mask) for kind in kinds] == [(0.5, 1.0), (0.1, 1.0), (0.3, 1.0)]
    made = replace(
        loader(wanted, objective=masked.Objective(context, kinds[2])),
        objectives=[masked.Objective(context, kind) for kind in kinds],
    )
    for number, rate in enumerate((0.5, 0.1, 0.3)):
        batches = [batch for step in range(4 * number, 4 * number + 4) for batch in made.batches(step)]
        share = sum(batch.targets for batch in batches) / sum(batch.inputs_BT.numel() for batch in batches)
        assert share == pytest.approx(rate, abs=0.06)
    assert memory.target_share(wanted) == 0.5


def test_a_wrong_setting_of_an_objective_names_its_phase() -> None:
    with pytest.raises(ValidationError, match=r"phases\.1\.objective_settings\.probability"):
        settings([TWO[0], {**TWO[1], "objective_settings": {"probability": 2}}], family="encoder")
