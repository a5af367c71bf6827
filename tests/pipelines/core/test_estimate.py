"""Estimates in general: durations from history, what costs, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core import artifact, provenance
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.estimate import Estimate, EstimateContext, Needs, Remedy, Time, refuse_what_does_not_fit
from pipelines.core.machine import Machine

SHARED = Machine("cpu", 10 * 10**9, "this machine has", shared=True)
OWN = Machine("cuda", 10 * 10**9, "compute.memory is", host_bytes=20 * 10**9)


def earlier(folder: Path, took_s: float, inputs: dict[str, str] | None = None, **summary: float) -> Artifact:
    """An artifact with a duration."""
    build = folder / f"build-{took_s}"
    build.mkdir(parents=True)
    return artifact.publish(
        build,
        folder / f"final-{took_s}",
        stage="toy",
        node="toy",
        identity={"config": {}, "inputs": inputs or {}, "took": took_s},
        parents={},
        summary=summary,
        provenance=provenance.capture(duration_s=took_s, source_digest="", data_hash=""),
    )


def test_equal_work_was_measured_other_work_is_scaled_and_unknown_work_tells_nothing(tmp_path: Path) -> None:
    unknown, known = earlier(tmp_path, 5.0), earlier(tmp_path, 60.0, work=100.0)
    context = EstimateContext(SHARED, history=(unknown, known))
    same, twice = (context.scaled_duration(w, lambda a: a.manifest.summary.get("work")) for w in (100.0, 200.0))
    assert same is not None
    assert twice is not None
    assert (same.seconds, same.source) == (60.0, "measured")
    assert (twice.seconds, twice.source) == (120.0, "scaled")
    assert context.scaled_duration(1.0, lambda _: None) is None
    assert EstimateContext(SHARED).closest_duration() is None


def test_a_number_is_found_in_what_an_artifact_was_made_of(tmp_path: Path) -> None:
    base = earlier(tmp_path, 1.0, parameters=7.0)
    middle = earlier(tmp_path, 2.0, {"model": base.manifest.fingerprint})
    top = earlier(tmp_path, 3.0, {"model": middle.manifest.fingerprint, "data": "elsewhere"})
    context = EstimateContext(SHARED, artifacts={a.manifest.fingerprint: a for a in (base, middle)})
    assert context.number_behind(top, "parameters") == 7.0
    assert context.number_behind(top, "tokens") is None


def test_a_price_is_of_one_rank_for_one_hour() -> None:
    estimate = Estimate(ranks=8, time=Time(1800.0, "stated", ""))
    assert estimate.cost(2.5) == 10.0
    assert estimate.cost(None) is None
    assert Estimate(ranks=8).cost(2.5) is None


@pytest.mark.parametrize(("machine", "fitting_ranks"), [(SHARED, 2), (OWN, 100)])
def test_ranks_share_the_memory_of_a_machine_but_not_that_of_their_gpus(machine: Machine, fitting_ranks: int) -> None:
    refuse_what_does_not_fit("toy", Estimate(ranks=fitting_ranks, memory={"weights": 5 * 10**9}), machine)
    with pytest.raises(ConfigError, match="toy cannot fit"):
        refuse_what_does_not_fit("toy", Estimate(ranks=fitting_ranks, memory={"weights": 11 * 10**9}), machine)


def test_a_refusal_says_what_is_needed_for_what_what_there_is_and_which_settings_fit() -> None:
    remedies = (
        Remedy(("a.b=1",), Needs(2, 6 * 10**9)),
        Remedy(("a.b=2", "c=3"), Needs(2, 4 * 10**9)),
        Remedy(("d=4",), Needs(1, 9 * 10**9)),
    )
    estimate = Estimate(ranks=2, memory={"weights": 4 * 10**9, "logits": 3 * 10**9}, remedies=remedies)
    with pytest.raises(ConfigError) as caught:
        refuse_what_does_not_fit("toy", estimate, SHARED)
    assert str(caught.value) == (
        "toy cannot fit: 2 ranks of 7 GB are needed (weights 4 GB, logits 3 GB), this machine has 10 GB\n"
        "  -> it would fit with a.b=2 c=3 (2 ranks of 4 GB); or d=4 (9 GB)"
    )


def test_offloaded_state_must_fit_the_memory_of_the_cpu() -> None:
    estimate = Estimate(ranks=4, memory={"weights": 10**9}, host_memory={"optimizer state": 6 * 10**9})
    with pytest.raises(ConfigError, match=r"4 ranks of 6 GB are needed of the CPU's memory .* 20 GB"):
        refuse_what_does_not_fit("toy", estimate, OWN)
    refuse_what_does_not_fit("toy", estimate, Machine("cuda", 10 * 10**9))
