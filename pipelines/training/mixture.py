"""Mixtures: how much of each source of the corpus a phase of training shows, as a pure function of the step.

`prepare.pack_by = "source"` packs the training split source by source, so that every sequence is of one source. A phase
is cut into blocks of about 2,048 samples, each of which holds the same number of samples of each source, in an order of
its own ("block-deterministic" mixing, as Levanter does it); the samples of a source come epoch after epoch, each in a
new order (`data_order`). So the n-th sample of a phase is known without looking at those before it, at any number of
ranks and after any resume.

Phases with sequences of one length go on where the earlier ones have stopped in a source: nothing of it is repeated
before all of it was shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipelines.core.errors import ConfigError
from pipelines.core.settings import Settings

BLOCK = 2048
"""Samples of a block, about: shares are right to half a sample in as many."""
_OTHERS = "*"


class MixtureConfig(Settings):
    """How much of each source is trained on. It needs prepare.pack_by = "source"."""

    weights: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        default_factory=dict,
        description="Source -> its share of the sequences, relative to the others; a source that is not named is left "
        "out; empty: all sources, by their size.",
    )
    temperature: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="Without weights, shares are sizes to the power of 1 / temperature: above 1, small sources are "
        "seen more often than their size says.",
    )
    max_epochs: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        default_factory=dict,
        description='Source -> passes over it at most, counted over all phases so far; "*" stands for all that are not '
        "named. What a source may not give any more, the others give in proportion to their shares.",
    )

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        if self.weights and self.temperature != 1.0:
            raise ValueError(f"temperature = {self.temperature:g} does nothing here: weights say the shares")
        idle = sorted(set(self.max_epochs) - set(self.weights) - {_OTHERS}) if self.weights else []
        if idle:
            raise ValueError(f"max_epochs.{idle[0]} does nothing here: weights leave the source out")
        return self


@dataclass(frozen=True)
class Source:
    """The sequences of one source; they follow one another in the training split."""

    name: str
    first: int
    """Number of the first sequence."""
    sequences: int


@dataclass(frozen=True)
class Portion:
    """What a phase takes of a source."""

    source: Source
    number: int
    """Place of the source among all of the split: what its orders are drawn by."""
    count: int
    """Samples of it in each block."""
    drawn: int
    """Samples of it that earlier phases with sequences of this length have taken."""


@dataclass(frozen=True)
class Mix:
    """What a phase is made of."""

    block: int
    """Samples of a block, of all sources."""
    order: int
    """Phase whose epochs it goes on with: the first one with sequences of this length."""
    chunks: int
    """Samples of a packed sequence."""
    portions: tuple[Portion, ...]


@dataclass(frozen=True)
class Stretch:
    """What is known of a phase without its data."""

    samples: int
    """Sequences that it shows, all steps together."""
    chunks: int
    """Into how many of these a packed sequence is cut."""
    settings: MixtureConfig


def sources_of(entries: Sequence[Mapping[str, Any]] | None) -> tuple[Source, ...]:
    """Return the sources of the training split, in its order.

    Args:
        entries: `splits.train.sources` of `index.json` of a prepare artifact; None where it has none.

    Raises:
        ConfigError: it was packed without regard to sources.
    """
    if entries is None:
        raise ConfigError(
            "pretrain.mixture: the prepared sequences hold documents of several sources",
            hint='set prepare.pack_by = "source"',
        )
    found: list[Source] = []
    for entry in entries:
        first = found[-1].first + found[-1].sequences if found else 0
        found.append(Source(entry["source"], first, entry["sequences"]))
    return tuple(found)


def resolve(stretches: Sequence[Stretch], sources: Sequence[Source]) -> tuple[Mix, ...]:
    """Return what each phase is made of.

    Raises:
        ConfigError: a source does not exist, or the sources may not give as much as a phase takes.
    """
    mixes: list[Mix] = []
    passes = dict.fromkeys((source.name for source in sources), 0.0)
    drawn: dict[tuple[int, str], int] = {}
    for number, stretch in enumerate(stretches):
        blocks = max(1, round(stretch.samples / BLOCK))
        block = -(-stretch.samples // blocks)
        chosen = _chosen(stretch.settings, sources)
        room = [_room(stretch, source, passes[source.name], blocks) for source in chosen]
        counts = _counts(_shares(stretch.settings, chosen), room, block)
        if counts is None:
            _refuse(number, stretch, block * blocks, sum(min(each, block) for each in room) * blocks)
        assert counts is not None
        for source, count in zip(chosen, counts, strict=True):
            if source.name in stretch.settings.weights and count == 0:
                raise ConfigError(
                    f"{_where(number)}.weights: {source.name!r} gets none of {block:,} sequences",
                    hint="give it more weight or more epochs, or take it out",
                )
        portions = tuple(
            Portion(source, sources.index(source), count, drawn.get((stretch.chunks, source.name), 0))
            for source, count in zip(chosen, counts, strict=True)
            if count
        )
        mixes.append(Mix(block, [s.chunks for s in stretches].index(stretch.chunks), stretch.chunks, portions))
        for each in portions:
            drawn[stretch.chunks, each.source.name] = each.drawn + each.count * blocks
            passes[each.source.name] += each.count * blocks / (each.source.sequences * stretch.chunks)
    return tuple(mixes)


def table(stretches: Sequence[Stretch], mixes: Sequence[Mix], length: int) -> list[dict[str, Any]]:
    """Return a row for each phase and source: share, tokens (padding included), and passes over it until then.

    Args:
        stretches: of the run.
        mixes: from `resolve`.
        length: tokens of a packed sequence.
    """
    rows: list[dict[str, Any]] = []
    passes: dict[str, float] = {}
    for number, (stretch, mix) in enumerate(zip(stretches, mixes, strict=True)):
        for portion in mix.portions:
            share = portion.count / mix.block
            samples, name = share * stretch.samples, portion.source.name
            passes[name] = passes.get(name, 0.0) + samples / (portion.source.sequences * mix.chunks)
            tokens = round(samples * (length // mix.chunks))
            rows.append({"phase": number, "source": name, "share": share, "tokens": tokens, "epochs": passes[name]})
    return rows


def _chosen(settings: MixtureConfig, sources: Sequence[Source]) -> list[Source]:
    """Return the sources that a mixture takes from, without those that fill no sequence.

    Raises:
        ConfigError: a source that does not exist.
    """
    known = [source.name for source in sources if source.sequences]
    for name in [*settings.weights, *settings.max_epochs]:
        if name not in known and name != _OTHERS:
            raise ConfigError(
                f"pretrain.mixture: the training text has no source {name!r}", hint=f"sources: {', '.join(known)}"
            )
    return [source for source in sources if source.sequences and (source.name in (settings.weights or known))]


def _shares(settings: MixtureConfig, chosen: Sequence[Source]) -> list[float]:
    if settings.weights:
        return [settings.weights[source.name] for source in chosen]
    return [source.sequences ** (1.0 / settings.temperature) for source in chosen]


def _room(stretch: Stretch, source: Source, passes: float, blocks: int) -> int:
    """Return how many samples of a source a block may hold at most."""
    caps = stretch.settings.max_epochs
    cap = caps.get(source.name, caps.get(_OTHERS, math.inf))
    left = (cap - passes) * source.sequences * stretch.chunks / blocks
    return stretch.samples if math.isinf(left) else max(0, math.floor(left + 1e-6))


def _counts(shares: Sequence[float], room: Sequence[int], block: int) -> list[int] | None:
    """Return the samples of each source in a block, in proportion to the shares within the room; None: too little."""
    if sum(room) < block:
        return None
    exact = [0.0] * len(shares)
    open_, left = list(range(len(shares))), float(block)
    while True:
        scale = left / sum(shares[i] for i in open_)
        full = [i for i in open_ if shares[i] * scale > room[i]]
        if not full:
            break
        for i in full:
            exact[i] = room[i]
        left = block - sum(exact[i] for i in range(len(shares)) if i not in open_ or i in full)
        open_ = [i for i in open_ if i not in full]
        if not open_:
            break
    for i in open_:
        exact[i] = shares[i] * left / sum(shares[j] for j in open_)
    counts = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    while (missing := block - sum(counts)) > 0:
        for i in [i for i in by_rest if counts[i] < room[i]][:missing]:
            counts[i] += 1
    return counts


def _refuse(number: int, stretch: Stretch, wanted: int, there: int) -> None:
    caps = ", ".join(f"{name} = {cap:g}" for name, cap in stretch.settings.max_epochs.items())
    raise ConfigError(
        f"{_where(number)}.max_epochs ({caps}) leave {there:,} sequences for the {wanted:,} of phase {number}",
        hint="train fewer steps, raise a cap, or take more sources in",
    )


def _where(number: int) -> str:
    return f"pretrain.mixture (phase {number})"
