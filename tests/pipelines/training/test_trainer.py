"""The loop's own pieces: token-weighted loss, validation, draws, stopping; whole runs are in test_worker.py."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.architectures.build import build
from models.architectures.config import IGNORED
from models.objectives import causal
from models.objectives.base import ObjectiveContext
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core.errors import IntegrityError, NumericError, Preempted
from pipelines.training.callbacks import (
    Checkpointing,
    LayerSampling,
    Logging,
    NonFiniteSteps,
    Validation,
    Work,
    ratios_by_group,
    validate,
)
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Batch, DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.engine import PlainEngine
from pipelines.training.loss_module import LossModule
from pipelines.training.metrics import MetricsLog, TimeSplit, read_records
from pipelines.training.optimizers import make_optimizer
from pipelines.training.phases import phases_of
from pipelines.training.trainer import State, Trainer
from pipelines.training.worker_spec import WorkerSpec

CPU = torch.device("cpu")
OBJECTIVE = causal.Objective(ObjectiveContext(0, 61, 0, 1, 2, 3), causal.Objective.Config())


def work_of(step: int) -> Work:
    return Work(192 * step, 192.0 * step)


def log(path: Path) -> MetricsLog:
    return MetricsLog(path, resume_at=0)


@dataclass
class Sequences:
    """A split in memory; every third sequence is half padding, so micro batches have unequal numbers of targets."""

    count: int
    sequence_length: int = 24

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Any) -> Any:
        tokens = np.stack([(np.arange(self.sequence_length) * (i + 3) + i) % 57 + 4 for i in indices])
        tokens[np.asarray(indices) % 3 == 0, self.sequence_length // 2 :] = 2
        return tokens


@dataclass
class Recorder:
    """Keeps what was saved."""

    saved: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def save(
        self,
        step: int,
        optimizer: FragmentOptimizer,
        state: Mapping[str, Any],
        *,
        rank: int,
        world: int,
        wait: bool,
    ) -> None:
        del optimizer, rank, world, wait
        self.saved.append((step, dict(state)))

    def go_back(self, before: int, optimizer: FragmentOptimizer, *, rank: int, world: int) -> dict[str, Any]:
        raise AssertionError(f"nothing was to spike: {before} {optimizer} {rank} {world}")


@dataclass
class Setting:
    """A trainer and what it was made of."""

    trainer: Trainer
    checkpointer: Recorder
    engine: PlainEngine
    loader: DataLoader


Make = Callable[..., Setting]


@pytest.fixture
def make(plain_spec: Callable[..., WorkerSpec], tmp_path: Path) -> Iterator[Make]:
    opened: list[Logging] = []

    def setting(stop: Callable[[], bool] = lambda: False, state: State | None = None, **changes: Any) -> Setting:
        spec = plain_spec(tmp_path, **changes)
        config = spec.config
        module = LossModule(build(config.architecture(spec.index), seed=0))
        engine = PlainEngine(module, lambda named: make_optimizer(config, named), device=CPU, precision="fp32")
        loader = loader_of(config, validation=7)
        checkpointer = Recorder()
        logging = Logging(log(tmp_path / "metrics.jsonl"), log(tmp_path / "losses.jsonl"), work_of, peak_flops=1.0)
        opened.append(logging)
        trainer = Trainer(
            config=config,
            engine=engine,
            loader=loader,
            checkpointer=checkpointer,
            state=state or State(),
            callbacks=[
                *([LayerSampling(config.lisa)] if config.lisa.enabled else []),
                NonFiniteSteps(tmp_path / "diagnostics"),
                Validation(),
                logging,
                Checkpointing(config.checkpoint),
            ],
            stop_requested=stop,
        )
        return Setting(trainer, checkpointer, engine, loader)

    yield setting
    for logging in opened:
        logging.close()


def loader_of(
    config: PretrainConfig, *, train: int = 40, validation: int = 7, rank: int = 0, world: int = 1
) -> DataLoader:
    return DataLoader(
        train=Sequences(train),
        validation=Sequences(validation),
        objective=OBJECTIVE,
        ranks=Ranks(rank, world, CPU),
        seed=config.seed,
        phases=phases_of(config),
        micro_batch_size=config.micro_batch_size,
        validation_sequences=config.validation_sequences,
    )


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(micro: int, make: Make) -> None:
    """Means of means would weigh the tokens of half-empty micro batches more."""
    whole, cut = make(micro_batch_size=8, steps=3), make(micro_batch_size=micro, steps=3)
    whole.trainer.run()
    cut.trainer.run()
    pairs = zip(whole.engine.module.named_parameters(), cut.engine.module.parameters(), strict=True)
    for (name, one), other in pairs:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)


def test_validation_is_the_mean_over_all_targets_of_the_sample(make: Make) -> None:
    made = make(validation_sequences=5, micro_batch_size=2)
    nats = targets = 0.0
    for number in [0, 1, 2, 4, 5]:
        arrays = OBJECTIVE.targets(Sequences(7).take([number]), np.array([number]), np.zeros(1, int))
        batch = Batch.of(*arrays, 2)
        nats += made.engine.loss(batch).item()
        targets += batch.targets
    assert validate(made.engine, made.loader) == pytest.approx(nats / targets, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_validates_as_many_batches_and_no_sequence_counts_twice(world: int) -> None:
    config = PretrainConfig(world_size=1, batch_size=8, micro_batch_size=2, validation_sequences=5)
    shares = [list(loader_of(config, rank=rank, world=world).validation_batches()) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for b in share for row in zip(b.inputs_BT, b.targets_BT, strict=True)]
    asked = [inputs.tolist() for inputs, targets in rows if (targets != IGNORED).any()]
    assert sorted(asked) == sorted(Sequences(7).take([0, 1, 2, 4, 5]).tolist())


def test_validation_leaves_no_gradient(make: Make) -> None:
    made = make()
    validate(made.engine, made.loader)
    assert all(parameter.grad is None for parameter in made.engine.module.parameters())


def test_a_split_without_sequences_is_refused() -> None:
    with pytest.raises(IntegrityError, match="the validation split of the prepare artifact holds no sequence"):
        loader_of(PretrainConfig(), validation=0)


def test_a_request_to_stop_checkpointer_and_ends_before_the_next_step(make: Make) -> None:
    requests = iter([False, False, False, True])
    made = make(stop=lambda: next(requests), checkpoint={"every": 100})
    with pytest.raises(Preempted, match="stopped after step 3"):
        made.trainer.run()
    ((step, state),) = made.checkpointer.saved
    assert (step, state["step"]) == (3, 3)


def test_checkpoints_come_at_their_interval_and_at_the_end(make: Make) -> None:
    made = make(steps=7, checkpoint={"every": 3})
    made.trainer.run()
    assert [step for step, _ in made.checkpointer.saved] == [3, 6, 7]


def test_a_stop_at_a_saved_step_checkpointer_no_second_time(make: Make) -> None:
    requests = iter([False, False, True])
    made = make(stop=lambda: next(requests), checkpoint={"every": 2})
    with pytest.raises(Preempted):
        made.trainer.run()
    assert [step for step, _ in made.checkpointer.saved] == [2]


def test_amid_non_finite_steps_nothing_is_saved(make: Make) -> None:
    made = make(checkpoint={"every": 1}, max_skipped=1)
    made.trainer.advance()
    with torch.no_grad():
        next(made.engine.module.parameters()).fill_(float("nan"))
    made.trainer.advance()
    with pytest.raises(NumericError, match="step 3 was not finite, 2 in a row"):
        made.trainer.advance()
    assert [step for step, _ in made.checkpointer.saved] == [1]
    assert made.trainer.state.skipped == 2


def test_lisa_draws_at_intervals_and_freezes_the_rest(make: Make) -> None:
    made = make(steps=12, lisa={"enabled": True, "layers": 1, "interval": 3})
    seen = []
    for _ in range(12):
        made.trainer.advance()
        (active,) = made.trainer.state.active or []
        seen.append(active)
        for name, parameter in made.engine.module.named_parameters():
            assert parameter.requires_grad == (".layers." not in name or f".layers.{active}." in name)
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert len(set(seen)) > 1
    with_moments = {f.name for f in made.engine.optimizer.fragments if made.engine.optimizer.fragment_state(f)}
    assert {n for n in with_moments if ".layers." in n} == {n for n in with_moments if f".layers.{seen[-1]}." in n}


def test_lisa_goes_on_with_the_saved_layers_in_mid_interval(make: Make) -> None:
    made = make(steps=3, state=State(step=2, active=[2]), lisa={"enabled": True, "layers": 1, "interval": 100})
    made.trainer.run()
    assert made.trainer.state.active == [2]
    frozen = [n for n, p in made.engine.module.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(".layers.0." in name or ".layers.1." in name for name in frozen)


def test_trust_ratios_are_averaged_over_the_tensors_of_a_group(make: Make) -> None:
    made = make(steps=3)
    made.trainer.run()
    single = made.engine.optimizer.trust_ratios()
    groups = ratios_by_group(made.engine.optimizer)
    of_layer = [ratio for name, ratio in single.items() if ".layers.1." in name]
    assert len(of_layer) == 7
    assert groups["layer.1"] == pytest.approx(math.fsum(of_layer) / 7)
    assert set(groups) == {"embedding", "layer.0", "layer.1", "layer.2"}


# ---- what a step reads from the device ------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host (`float`, `bool`, `item`), by the function that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.by_function: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()
            own = [
                f
                for f in frames
                if "/tests/" not in f.filename and any(part in f.filename for part in ("/pipelines/", "/models/"))
            ]
            self.by_function[own[-1].name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_a_step_without_a_record_reads_what_the_optimizer_decides_by_and_nothing_else(name: str, make: Make) -> None:
    """Each read makes the host wait for the device: the loss, the targets and the request to stop need none."""
    made = make(steps=8, log_every=100, validate_every=100, checkpoint={"every": 100}, optimizer={"name": name})
    made.trainer.advance()  # what is made once
    with HostReads() as reads:
        for _ in range(4):
            made.trainer.advance()
    config = made.trainer.config
    passes = 4 * config.batch_size // config.micro_batch_size
    # transformers 5.23 looks for packed sequences in the positions that it made itself: one read a forward pass.
    assert reads.by_function.pop("forward", 0) <= passes
    assert set(reads.by_function) <= {"_recorded_norm", "_step"}
    assert sum(reads.by_function.values()) <= 3 * 4
    assert len(made.trainer.losses._own) == 5


def test_losses_that_were_read_late_are_those_of_every_step(make: Make, tmp_path: Path) -> None:
    make(steps=7, log_every=1).trainer.run()
    each = (tmp_path / "losses.jsonl").read_bytes()
    (tmp_path / "losses.jsonl").unlink()
    make(steps=7, log_every=3, validate_every=100, checkpoint={"every": 2}).trainer.run()
    late = read_records(tmp_path / "losses.jsonl")
    assert [record["step"] for record in late] == list(range(1, 8))
    assert [record["loss"] for record in late] == [json.loads(line)["loss"] for line in each.splitlines()]


def test_speed_counts_the_work_since_the_last_record(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation between two records makes one of its own: the next one must not count those steps again."""
    made = make(steps=10, log_every=4, validate_every=5)

    @contextlib.contextmanager
    def one_second(split: TimeSplit, part: str) -> Iterator[None]:
        yield
        split._seconds[part] = split._seconds.get(part, 0.0) + (part == "step")

    monkeypatch.setattr(TimeSplit, "__call__", one_second)
    made.trainer.run()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 5, 8, 10]
    tokens, steps = np.diff([0] + [r["tokens"] for r in records]), np.diff([0] + [r["step"] for r in records])
    assert [record["tokens_per_s"] for record in records] == (tokens / steps).tolist()
    assert all(140 < rate < 192 for rate in tokens / steps)  # padding is no token that was seen
    assert [record["mfu"] for record in records] == (tokens / steps).tolist()
