"""Mixtures: shares to the sample, caps that hold, sources that run through, and one order at any number of ranks."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.errors import ConfigError
from pipelines.training import data_order, mixture, phases
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import DataLoader
from pipelines.training.distributed import Ranks
from pipelines.training.mixture import Mix, MixtureConfig, Source, Stretch
from pipelines.training.phases import phases_of
from tests.pipelines.training.test_phases import CAUSAL, PLAIN, Numbers

SOURCES = (Source("code", 0, 40), Source("talk", 40, 10), Source("wiki", 50, 150))


def index(*sizes: int, length: int = 24) -> dict[str, Any]:
    entries = [{"source": name, "sequences": size} for name, size in zip(("code", "talk", "wiki"), sizes, strict=False)]
    return {"sequence_length": length, "splits": {"train": {"sources": entries}}}


def resolved(*wanted: tuple[int, dict[str, Any]], chunks: int = 1) -> tuple[Mix, ...]:
    stretches = [Stretch(samples, chunks, MixtureConfig.model_validate(table)) for samples, table in wanted]
    return mixture.resolve(stretches, SOURCES)


def drawn(mix: Mix, samples: int, phase: int = 0, seed: int = 3) -> Any:
    return data_order.mixed(seed, 0, samples, mix, phase=phase)


def by_source(samples: Any, chunks: int = 1) -> Counter[str]:
    names = [next(s.name for s in reversed(SOURCES) if n // chunks >= s.first) for n in samples.tolist()]
    return Counter(names)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, {"code": 20, "talk": 5, "wiki": 75}),
        ({"weights": {"code": 3, "wiki": 1}}, {"code": 75, "wiki": 25}),
        ({"temperature": 100.0}, {"code": 33, "talk": 33, "wiki": 34}),
        ({"weights": {"talk": 9, "wiki": 1}, "max_epochs": {"talk": 2}}, {"talk": 20, "wiki": 80}),
        ({"temperature": 100.0, "max_epochs": {"*": 1}}, {"code": 40, "talk": 10, "wiki": 50}),
    ],
)
def test_a_phase_takes_of_each_source_what_the_mixture_says(table: dict[str, Any], expected: dict[str, int]) -> None:
    (mix,) = resolved((100, table))
    assert by_source(drawn(mix, 100)[0]) == expected


def test_no_sample_of_a_source_comes_twice_before_all_have_come() -> None:
    expected_passes = 3
    (mix,) = resolved((100, {"weights": {"talk": 3, "wiki": 7}}))
    samples, epochs = drawn(mix, 100)
    talk = samples[(samples >= 40) & (samples < 50)]
    assert len(talk) == 30
    order = np.argsort(epochs[(samples >= 40) & (samples < 50)], kind="stable")
    passes = talk[order].reshape(expected_passes, 10)
    assert all(sorted(each) == list(range(40, 50)) for each in passes.tolist())
    assert len({tuple(each) for each in passes.tolist()}) == expected_passes, "each pass has an order of its own"


def test_a_later_phase_goes_on_where_the_first_has_stopped() -> None:
    first, second = resolved((60, {"weights": {"wiki": 1}}), (80, {"weights": {"wiki": 9, "code": 1}}))
    before, _ = drawn(first, 60)
    after, epochs = drawn(second, 80, phase=1)
    wiki = after[after >= 50]
    assert len(wiki) == 72
    assert not set(before.tolist()) & set(wiki.tolist()), "132 of 150 sequences, none of them twice"
    assert set(epochs.tolist()) == {0}


def test_long_phases_are_cut_into_blocks_with_equal_shares() -> None:
    (mix,) = resolved((10_000, {"weights": {"code": 1, "wiki": 3}}))
    assert mix.block == 2000
    for start in range(0, 10_000, 2000):
        assert by_source(drawn(mix, 10_000)[0][start : start + 2000]) == {"code": 500, "wiki": 1500}
    first, second = drawn(mix, 10_000)[0][:2000] < 50, drawn(mix, 10_000)[0][2000:4000] < 50
    assert not np.array_equal(first, second), "the places of a source differ from block to block"


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 6000), count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_any_stretch_is_known_without_what_comes_before(start: int, count: int, seed: int) -> None:
    (mix,) = resolved((6500, {"temperature": 3.0}), chunks=2)
    whole, epochs = data_order.mixed(seed, 0, 6500, mix, phase=0)
    samples, some = data_order.mixed(seed, start, count, mix, phase=0)
    assert samples.tolist() == whole[start : start + count].tolist()
    assert some.tolist() == epochs[start : start + count].tolist()


@settings(deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8),
    rooms=st.lists(st.integers(0, 500), min_size=8, max_size=8),
    block=st.integers(1, 700),
)
def test_counts_fill_a_block_within_the_room_and_near_the_shares(
    shares: list[float], rooms: list[int], block: int
) -> None:
    room = rooms[: len(shares)]
    counts = mixture._counts(shares, room, block)
    if counts is None:
        assert sum(room) < block
        return
    assert sum(counts) == block
    assert all(0 <= count <= most for count, most in zip(counts, room, strict=True))
    free = [n for n in range(len(shares)) if counts[n] < room[n] - 1]
    for one in free:
        for other in free:
            assert abs(counts[one] / shares[one] - counts[other] / shares[other]) <= 2.0 / min(
                shares[one], shares[other]
            )


TABLE = {
    "steps": 6,
    "batch_size": 8,
    "schedule": {"warmup": 0},
    "mixture": {"weights": {"code": 1.0, "wiki": 3.0}},
}


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({**PLAIN, **TABLE, **changes})


def loader(wanted: PretrainConfig, rank: int, world: int) -> DataLoader:
    read = Numbers(200)
    mixes = phases.mixes_of(wanted, index(40, 10, 150))
    ranks = Ranks(rank, world, torch.device("cpu"))
    return DataLoader(read, read, CAUSAL, ranks, wanted.seed, phases_of(wanted), 2, 2, mixes=mixes)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_number_of_ranks_trains_on_the_same_samples(world: int) -> None:
    wanted = config()
    one = loader(wanted, 0, 1)
    for step in range(wanted.steps):
        together = [b.inputs_BT for rank in range(world) for b in loader(wanted, rank, world).batches(step)]
        rows = sorted(torch.cat(together).tolist())
        assert rows == sorted(torch.cat([b.inputs_BT for b in one.batches(step)]).tolist())
        assert loader(wanted, 0, world).digest(step) == one.digest(step)
    every = np.concatenate([one.ids(step) for step in range(wanted.steps)])
    assert by_source(every) == {"code": 12, "wiki": 36}


def test_phases_have_mixtures_and_lengths_of_their_own() -> None:
    wanted_phases = [
        {"steps": 2, "batch_size": 8, "sequence_length": 12},
        {"steps": 2, "batch_size": 8, "mixture": {"weights": {"talk": 1.0}}},
    ]
    plain = {key: value for key, value in {**PLAIN, **TABLE}.items() if key not in ("steps", "batch_size")}
    wanted = PretrainConfig.model_validate({**plain, "phases": wanted_phases})
    one = loader(wanted, 0, 1)
    assert by_source(np.concatenate([one.ids(step) for step in (0, 1)]), chunks=2) == {"code": 4, "wiki": 12}
    assert by_source(np.concatenate([one.ids(step) for step in (2, 3)])) == {"talk": 16}
    stretches, mixes = phases.stretches_of(wanted, 24), phases.mixes_of(wanted, index(40, 10, 150))
    assert mixture.table(stretches, mixes, 24) == [
        {"phase": 0, "source": "code", "share": 0.25, "tokens": 48, "epochs": 4 / 80},
        {"phase": 0, "source": "wiki", "share": 0.75, "tokens": 144, "epochs": 12 / 300},
        {"phase": 1, "source": "talk", "share": 1.0, "tokens": 384, "epochs": 1.6},
    ]


def test_without_a_mixture_nothing_changes() -> None:
    wanted = PretrainConfig.model_validate({**PLAIN, **TABLE, "mixture": None})
    assert phases.mixes_of(wanted, {"sequence_length": 24, "splits": {"train": {}}}) == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weights": {"wikki": 1.0}}, r"no source 'wikki'.*\n.*code, talk, wiki"),
        ({"max_epochs": {"books": 1.0}}, r"no source 'books'"),
        ({"weights": {"talk": 1.0}, "max_epochs": {"talk": 4.0}}, r"leave 40 sequences for the 48 of phase 0"),
        ({"max_epochs": {"*": 0.2}}, r"leave 40 sequences for the 48"),
        ({"weights": {"talk": 1.0, "wiki": 1000.0}}, r"'talk' gets none of 48 sequences"),
    ],
)
def test_what_cannot_be_met_is_refused_with_what_there_is(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        phases.mixes_of(config(mixture=table), index(40, 10, 150))
    assert re.search(message, f"{caught.value.message}\n{caught.value.hint}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weights": {"a": 1.0}, "temperature": 2.0}, "temperature = 2 does nothing here"),
        ({"weights": {"a": 1.0}, "max_epochs": {"b": 1.0}}, "max_epochs.b does nothing here"),
    ],
)
def test_a_setting_that_does_nothing_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureConfig.model_validate(table)


def test_sequences_of_several_sources_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="hold documents of several sources"):
        phases.mixes_of(config(), {"sequence_length": 24, "splits": {"train": {}}})


def test_caps_count_over_all_phases() -> None:
    first, second = resolved(
        (30, {"weights": {"talk": 1.0}}), (20, {"max_epochs": {"talk": 3.5}, "temperature": 100.0})
    )
    assert {p.source.name: p.count for p in first.portions} == {"talk": 30}
    assert {p.source.name: p.count for p in second.portions}["talk"] == 5
    assert dataclasses.asdict(second.portions[1])["drawn"] == 30
