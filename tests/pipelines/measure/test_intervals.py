"""Intervals that cover, pair and refuse; one table for parent, variants and baselines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from pipelines.measure import intervals
from pipelines.measure.intervals import Interval


def _corpus(generator: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw documents of uneven size whose difficulty varies; 1.5 nats per byte on average over bytes."""
    sizes = generator.integers(200, 4000, size=documents).astype(np.float64)
    return sizes * generator.normal(1.5, 0.3, size=documents), sizes


def test_bits_per_byte_is_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    found = intervals.bits_per_byte([10.0, 90.0], [10, 30])
    assert found.value == pytest.approx(100.0 / 40.0 / math.log(2.0), rel=1e-12)


def test_the_bootstrap_equals_a_loop_over_resamples() -> None:
    nats, sizes = _corpus(np.random.default_rng(3), 7)
    drawn = np.concatenate(list(intervals.resamples(7, 300, 5)))
    assert drawn.shape == (300, 7)
    ratios = sorted(sum(nats[i] for i in row) / (sum(sizes[i] for i in row) * math.log(2.0)) for row in drawn.tolist())
    found = intervals.bits_per_byte(nats, sizes, samples=300, seed=5, confidence=0.9)
    # Student's t of 6 degrees of freedom has 5 % below -1.943180; the resamples spread sqrt(6 / 7) of what samples do.
    tail = NormalDist().cdf(-1.9431803 * math.sqrt(7 / 6))
    assert found.low == pytest.approx(np.quantile(ratios, tail), rel=1e-6)
    assert found.high == pytest.approx(np.quantile(ratios, 1 - tail), rel=1e-6)


def test_an_interval_over_few_documents_covers_the_truth_about_as_often_as_it_says() -> None:
    """400 corpora of 6 documents at 95 %: plain percentiles cover it in 84 % of them."""
    covered = 0
    for repeat in range(400):
        nats, sizes = _corpus(np.random.default_rng(repeat), 6)
        found = intervals.bits_per_byte(nats, sizes, samples=400, seed=repeat, confidence=0.95)
        covered += found.low <= 1.5 / math.log(2.0) <= found.high
    assert 0.89 <= covered / 400 <= 0.99


def test_with_many_documents_the_ends_are_the_plain_percentiles() -> None:
    assert intervals.expanded_tail(10_000, 0.95) == pytest.approx(0.025, rel=1e-3)
    assert intervals.expanded_tail(2, 0.95) < 1e-12


def test_resamples_do_not_depend_on_how_they_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(intervals.resamples(11, 100, 1)))
    monkeypatch.setattr(intervals, "_CHUNK_DRAWS", 50)
    blocks = list(intervals.resamples(11, 100, 1))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_a_ninety_percent_interval_covers_the_truth_about_ninety_percent_of_the_time() -> None:
    """200 corpora of 60 documents: 0.90 has a binomial standard error of 0.021; the percentile bootstrap runs low."""
    covered = 0
    for repeat in range(200):
        nats, sizes = _corpus(np.random.default_rng(repeat), 60)
        found = intervals.bits_per_byte(nats, sizes, samples=400, seed=repeat, confidence=0.9)
        covered += found.low <= 1.5 / math.log(2.0) <= found.high
    assert 0.84 <= covered / 200 <= 0.96


def test_a_paired_interval_covers_and_is_far_narrower_than_unpaired_ones() -> None:
    """The variant is 2 % worse than its parent on average: what documents share must not hide it."""
    covered, found_worse, unpaired_separate = 0, 0, 0
    for repeat in range(200):
        generator = np.random.default_rng(1000 + repeat)
        parent, sizes = _corpus(generator, 40)
        variant = parent * generator.normal(1.02, 0.01, size=40)
        found = intervals.paired_ratio(variant, parent, sizes, samples=400, seed=repeat, confidence=0.9)
        covered += found.low <= 1.02 <= found.high
        found_worse += found.low > 1.0
        alone = [intervals.bits_per_byte(n, sizes, samples=400, seed=repeat, confidence=0.9) for n in (parent, variant)]
        unpaired_separate += alone[0].high < alone[1].low
    assert 0.83 <= covered / 200 <= 0.96
    assert found_worse >= 195
    assert unpaired_separate <= 5


def test_equal_models_give_a_ratio_of_exactly_one() -> None:
    nats, sizes = _corpus(np.random.default_rng(0), 12)
    found = intervals.paired_ratio(nats, nats, sizes)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_the_null_of_no_difference_is_rejected_at_the_nominal_rate() -> None:
    rejected = 0
    for repeat in range(200):
        generator = np.random.default_rng(5000 + repeat)
        parent, sizes = _corpus(generator, 50)
        a, b = (parent * generator.normal(1.0, 0.01, size=50) for _ in range(2))
        found = intervals.paired_ratio(a, b, sizes, samples=400, seed=repeat, confidence=0.9)
        rejected += not found.low <= 1.0 <= found.high
    assert 0.04 <= rejected / 200 <= 0.17


def test_paired_difference_is_the_difference_of_means() -> None:
    a, b = [1, 1, 0, 1], [1, 0, 0, 0]
    found = intervals.paired_difference(a, b, samples=1000)
    assert found.value == pytest.approx(0.5)
    assert found.low >= 0.0
    assert found.high <= 1.0


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    nats, sizes = _corpus(np.random.default_rng(0), 30)
    first, again, other = (intervals.bits_per_byte(nats, sizes, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.value == other.value


@pytest.mark.parametrize(
    ("nats", "sizes", "message"),
    [
        ([1.0, 2.0], [1, 2, 3], "not of the same documents"),
        ([1.0], [1], "at least two"),
        ([1.0, math.nan], [1, 2], "non-finite"),
        ([[1.0, 2.0]], [[1, 2]], "not of the same documents"),
    ],
)
def test_arrays_that_do_not_pair_are_refused(nats: Any, sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intervals.bits_per_byte(nats, sizes)


def _evaluation(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "bits_per_byte": {"value": 2.1, "low": 2.0, "high": 2.2},
        "truncated": False,
        "size_bytes": 1000,
        "tasks": {"cloze": {"accuracy": 0.5, "stderr": 0.1, "n": 24, "chance": 0.25}},
        "baselines": {"gzip": 3.2, "order1": 3.1},
        "versus_base": None,
    }
    return base | changes


def test_the_table_has_a_base_model_variants_and_baselines_with_the_same_columns() -> None:
    ratio = {"value": 1.01, "low": 1.0, "high": 1.02}
    variant = _evaluation(
        versus_base={"bits_per_byte_ratio": ratio, "kl_nats_per_token": 0.02},
        baselines={},
        tasks={"cloze": {"accuracy": 0.4}, "addition": {"accuracy": 0.1}},
        truncated=True,
    )
    observed = {"latency": {"prefill_ms_per_token": 0.1, "decode_ms_per_token": 2.0, "peak_memory_bytes": 7}}
    rows = intervals.table({"pretrain": _evaluation(observations=observed), "int8": variant})
    assert [(row["model"], row["kind"]) for row in rows] == [
        ("pretrain", "base"), ("int8", "variant"), ("gzip", "baseline"), ("order1", "baseline"),
    ]  # fmt: skip
    assert len({tuple(row) for row in rows}) == 1
    assert (rows[0]["decode_ms"], rows[0]["peak_memory_bytes"], rows[0]["ratio"]) == (2.0, 7, None)
    assert (rows[1]["ratio"], rows[1]["kl"], rows[1]["truncated"], rows[1]["decode_ms"]) == (1.01, 0.02, True, None)
    assert (rows[0]["task.addition"], rows[1]["task.addition"]) == (None, 0.1)
    assert rows[2]["bits_per_byte"] == 3.2
    json.dumps(rows, allow_nan=False)


def test_read_joins_result_and_observations_and_does_without_the_latter(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(_evaluation()))
    assert intervals.read(tmp_path)["observations"] == {}
    (tmp_path / "observations.json").write_text(json.dumps({"wall_s": 3.0}))
    assert intervals.read(tmp_path)["observations"] == {"wall_s": 3.0}


def test_an_interval_prints_its_ends() -> None:
    assert str(Interval(1.0, 0.5, 1.25)) == "1.0000 [0.5000, 1.2500]"
    assert Interval(1.0, 0.5, 1.25).to_json() == {"value": 1.0, "low": 0.5, "high": 1.25}


def test_shuffled_pairs_lose_what_pairing_gains() -> None:
    """Control: the narrow interval comes from the pairing, not from the arithmetic."""
    generator = np.random.default_rng(4)
    parent, sizes = _corpus(generator, 40)
    variant = parent * generator.normal(1.02, 0.01, size=40)
    order = list(range(40))
    random.Random(0).shuffle(order)
    paired = intervals.paired_ratio(variant, parent, sizes)
    broken = intervals.paired_ratio(variant[order], parent, sizes)
    assert broken.high - broken.low > 5 * (paired.high - paired.low)
