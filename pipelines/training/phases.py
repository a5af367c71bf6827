"""The phases of a training: for every step the batch, the length of its sequences, and its learning rate.

Everything is a function of the step alone, so a run may stop in any phase, on any number of ranks, and go on. A
pretraining without `phases` is one phase.

The schedule of "BERT in 76 minutes" (arXiv 1904.00962, section 4) in these terms: a first phase of short sequences in
large batches, a second one of long sequences in smaller batches that warms up again; rates that grow with the square
root of the batch; and a warm-up given in *steps*. Equal steps at every batch are epochs in proportion to the batch,
which is the paper's linear-epoch warm-up (1/320 of the run at a batch of 512 and 1/5 at 32 K both are 3,125 steps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.optim import schedule
from pipelines.core.errors import ConfigError
from pipelines.training import mixture
from pipelines.training.config import PhaseConfig, PretrainConfig, ScheduleConfig
from pipelines.training.mixture import Mix, MixtureConfig, Stretch
from pipelines.training.optimizer_config import LrScaling


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with sequences of one length."""

    number: int
    """Counted from 0."""
    first: int
    """Step of the run that it begins with."""
    steps: int
    sequence_length: int | None
    """Tokens of a sequence; None: as they were packed."""
    batch_schedule: tuple[tuple[int, int], ...]
    """(step of the phase, batch from there on), ascending; the batch doubles from one to the next."""
    micro_batch: int
    rate: float
    """Peak learning rate at `base_batch` sequences, or at every batch where there is none."""
    scaling: LrScaling | None
    schedule: ScheduleConfig

    @property
    def end(self) -> int:
        """The step of the run after the last one."""
        return self.first + self.steps

    def batch(self, phase_step: int) -> int:
        """Return the sequences of a step of the phase."""
        return next(size for start, size in reversed(self.batch_schedule) if start <= phase_step)

    def samples_before(self, phase_step: int) -> int:
        """Return how many sequences the phase has shown before its step `phase_step`."""
        ends = [start for start, _ in self.batch_schedule[1:]] + [self.steps]
        return sum(
            size * (min(phase_step, end) - start)
            for (start, size), end in zip(self.batch_schedule, ends, strict=True)
            if phase_step > start
        )

    def learning_rate(self, phase_step: int) -> float:
        """Return the learning rate of a step of the phase."""
        return self.rate * scale(self.scaling, self.batch(phase_step)) * self._share(phase_step)

    def _share(self, phase_step: int) -> float:
        settings = self.schedule
        return schedule.multiplier(
            phase_step,
            total=self.steps,
            warmup=settings.warmup_steps(self.steps),
            warmup_form=settings.warmup_form,
            decay=settings.decay,
            floor=settings.floor,
            power=settings.power,
            stable=settings.stable,
        )


Phases = tuple[Phase, ...]


def phases_of(config: PretrainConfig) -> Phases:
    """Return the phases of a run, in order."""
    ordered: list[Phase] = []
    stretches = config.phases or (PhaseConfig(steps=config.steps, batch_size=config.batch_size),)
    for number, phase in enumerate(stretches):
        ordered.append(_phase(config, phase, number, ordered[-1].end if ordered else 0))
    return tuple(ordered)


def at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase that a step of the run belongs to; the last one also beyond its end."""
    return next((phase for phase in phases if step < phase.end), phases[-1])


def doubling_batches(start: int, batch: int, steps: int) -> tuple[tuple[int, int], ...]:
    """Return a batch that doubles from `start` to `batch` at even distances over `steps` steps."""
    doublings = (batch // start).bit_length() - 1
    return tuple((round(number * steps / max(doublings, 1)), start << number) for number in range(doublings + 1))


def scale(scaling: LrScaling | None, batch: int) -> float:
    """Return the factor of the learning rate at a batch."""
    if scaling is None:
        return 1.0
    ratio = batch / scaling.base_batch
    return math.sqrt(ratio) if scaling.rule == "sqrt" else ratio


def chunks_a_sequence(phase: Phase, packed: int) -> int:
    """Return into how many sequences of a phase a packed one is cut.

    Raises:
        ConfigError: the phase's length does not divide the packed one.
    """
    length = phase.sequence_length or packed
    if packed % length:
        fitting = [n for n in range(2, packed + 1) if packed % n == 0]
        raise ConfigError(
            f"pretrain.phases.{phase.number}.sequence_length = {length} does not divide prepare.sequence_length = "
            f"{packed}",
            hint=f"valid: {', '.join(map(str, fitting))}",
        )
    return packed // length


def stretches_of(config: PretrainConfig, length: int) -> list[Stretch]:
    """Return the phases as `mixture` takes them; none where sources are not mixed.

    Args:
        config: of the training.
        length: tokens of a packed sequence.

    Raises:
        ConfigError: a phase's length does not divide the packed one.
    """
    own = [phase.mixture or config.mixture for phase in config.phases] or [config.mixture]
    if not any(own):
        return []
    return [
        Stretch(phase.samples_before(phase.steps), chunks_a_sequence(phase, length), settings or MixtureConfig())
        for phase, settings in zip(phases_of(config), own, strict=True)
    ]


def mixes_of(config: PretrainConfig, index: Mapping[str, Any]) -> tuple[Mix, ...]:
    """Return what each phase is made of; empty where sources are not mixed.

    Args:
        config: of the training.
        index: `index.json` of the prepare artifact.

    Raises:
        ConfigError: a source does not exist, or may not give as much as is asked of it.
    """
    stretches = stretches_of(config, index["sequence_length"])
    if not stretches:
        return ()
    return mixture.resolve(stretches, mixture.sources_of(index["splits"]["train"].get("sources")))


def tokens_by_length(phases: Sequence[Phase], step: int, packed: int) -> dict[int, int]:
    """Return how many tokens were trained on before a step, by length of the sequences they came in."""
    counts: dict[int, int] = {}
    for phase in phases:
        length = phase.sequence_length or packed
        done = phase.samples_before(min(max(step - phase.first, 0), phase.steps))
        counts[length] = counts.get(length, 0) + done * length
    return counts


def _phase(config: PretrainConfig, phase: PhaseConfig, number: int, first: int) -> Phase:
    warm = phase.batch_warmup
    batch_schedule = (
        ((0, phase.batch_size),) if warm is None else doubling_batches(warm.start, phase.batch_size, warm.steps)
    )
    return Phase(
        number=number,
        first=first,
        steps=phase.steps,
        sequence_length=phase.sequence_length,
        batch_schedule=batch_schedule,
        micro_batch=phase.micro_batch_size or config.micro_batch_size,
        rate=config.optimizer.peak_lr if phase.lr is None else phase.lr,
        scaling=config.optimizer.lr_scaling if phase.lr is None else None,
        schedule=phase.schedule or config.schedule,
    )
