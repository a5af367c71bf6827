"""Kill anything, run the same command again: the same bytes come out."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import artifact

pytestmark = pytest.mark.slow
full = pytest.mark.faults_full

STEPS = list(range(1, 21))


def assert_same(finished: Any, oracle: Any) -> None:
    assert finished.losses == oracle.losses
    assert finished.files == oracle.files
    assert finished.made.digest == oracle.made.digest
    assert finished.steps == oracle.steps == STEPS


def test_sigkill_of_a_rank_at_step_7_costs_two_steps_and_no_bit(killed_at_7: Any, uninterrupted: Any) -> None:
    finished = killed_at_7.finish()
    assert finished.resumed_at == [5]
    assert_same(finished, uninterrupted)


@full
def test_sigkill_inside_a_save_of_the_real_trainer(pretraining: Callable[..., Any], uninterrupted: Any) -> None:
    """First in mid-shard on one rank, then, in the second attempt, between manifest and rename."""
    run = pretraining()
    first = run.attempt(faults=[{"point": "checkpoint.mid_shard", "rank": 1, "nth": 25, "action": "SIGKILL"}])
    assert first.code == 4
    left = run.checkpoints.steps()
    second = run.attempt(faults=[{"point": "artifact.after_manifest", "rank": 0, "nth": 2, "action": "SIGKILL"}])
    assert second.code == 4
    assert run.checkpoints.steps()[-1] == (left[-1] if left else 0) + 5
    assert_same(run.finish(), uninterrupted)


@full
def test_sigkill_of_the_launcher_takes_the_ranks_with_it(pretraining: Callable[..., Any], uninterrupted: Any) -> None:
    run = pretraining()
    process = run.start()
    run.wait_for_step(6, process)
    process.kill()
    process.communicate()
    assert_same(run.finish(), uninterrupted)


def test_sigterm_saves_on_all_ranks_at_one_step_and_ends_with_75(
    pretraining: Callable[..., Any], uninterrupted: Any
) -> None:
    run = pretraining()
    slow = [{"point": "train.after_step", "rank": 0, "step": 7, "action": "delay", "seconds": 1.0}]
    process = run.start(faults=slow)
    run.wait_for_step(6, process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 75, message
    assert "run the same command again" in message
    stopped_at = run.checkpoints.steps()[-1]
    assert stopped_at not in (5, 10)  # saved where it stopped, not where a save was due
    finished = run.finish()
    assert finished.resumed_at == [stopped_at]
    assert_same(finished, uninterrupted)


@full
def test_sigterm_to_one_rank_stops_all_of_them(pretraining: Callable[..., Any], uninterrupted: Any) -> None:
    """As a cluster scheduler does it, past the launcher."""
    run = pretraining()
    stopped = run.attempt(faults=[{"point": "train.after_step", "rank": 1, "step": 7, "action": "SIGTERM"}])
    assert stopped.code == 75
    assert run.checkpoints.steps() == [5, 7]
    assert_same(run.finish(), uninterrupted)


@full
def test_damaged_checkpoints_fall_back_and_are_counted(pretraining: Callable[..., Any], uninterrupted: Any) -> None:
    run = pretraining()
    kill = {"point": "train.after_step", "rank": 0, "step": 17, "action": "SIGKILL"}
    assert run.attempt(faults=[kill]).code == 4
    assert run.checkpoints.steps() == [5, 10, 15]
    shard = run.scratch / "checkpoints" / "step-00000015" / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    finished = run.finish()
    assert finished.resumed_at == [10]
    assert_same(finished, uninterrupted)


def test_when_every_checkpoint_is_damaged_the_run_refuses_to_start_from_zero(killed_at_7: Any) -> None:
    run = killed_at_7
    shard = run.scratch / "checkpoints" / "step-00000005" / "rank-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 4
    shard.write_bytes(raw)
    refused = run.attempt()
    assert refused.code == 3
    assert "every one is damaged" in refused.message
    assert "delete" in refused.message
    assert list(run.store.artifacts()) == []
    assert [p.name for p in (run.scratch / "checkpoints").iterdir()] == ["step-00000005.corrupt"]


@full
def test_a_hung_rank_is_found_and_the_run_goes_on_to_the_same_bytes(
    pretraining: Callable[..., Any], uninterrupted: Any
) -> None:
    run = pretraining()
    run.compute |= {"heartbeat_timeout_s": 15.0}
    hung = run.attempt(faults=[{"point": "train.after_step", "rank": 1, "step": 7, "action": "SIGSTOP"}])
    assert hung.code == 4
    assert "gave no sign of life" in hung.message
    stacks = [path.read_text() for path in sorted((run.scratch / "logs").glob("stacks-*.txt"))]
    assert len(stacks) == 2
    assert "fault_point" in stacks[1]  # says where the rank was
    assert_same(run.finish(), uninterrupted)


@full
def test_two_runs_of_one_stage_at_once_train_once(pretraining: Callable[..., Any], uninterrupted: Any) -> None:
    run = pretraining()
    first = run.start()
    run.wait_for_step(1, first)
    refused = run.attempt(wait_s=0)
    assert refused.code == 6
    assert f"process {first.pid}" in refused.message
    waited = run.start()
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    assert waited.communicate(timeout=120)[0] == out
    found = artifact.load(Path(out.strip()))
    assert found.digest == uninterrupted.made.digest
    assert found.read_json("observations.json")["resumed_at"] == []


def test_nan_on_one_rank_is_skipped_by_all_and_bounded(pretraining: Callable[..., Any]) -> None:
    """Each of the four steps 6 to 9 is poisoned on rank 1 only; three in a row are allowed."""
    run = pretraining()
    poison = [{"point": "train.loss", "rank": 1, "step": step, "action": "nan"} for step in (6, 7, 8, 9)]
    ended = run.attempt(faults=poison)
    assert ended.code == 5
    assert "step 9 was not finite, 4 in a row with it" in ended.message
    assert run.checkpoints.steps() == [5]  # none after the first NaN
    notes = [json.loads((run.scratch / "diagnostics" / f"step-{n}.json").read_text()) for n in (6, 7, 8, 9)]
    assert [note["skipped_in_row"] for note in notes] == [1, 2, 3, 4]
    assert all(len(set(note["sample_ids"])) == 8 for note in notes)
    assert all(note["loss_by_rank"][1] == "nan" != note["loss_by_rank"][0] for note in notes)


@full
def test_a_skipped_step_changes_no_weight(pretraining: Callable[..., Any]) -> None:
    """The validation loss is a function of the weights alone: bit-identical around the skipped step, and only there."""
    run = pretraining(steps=8, validate_every=1, schedule={"warmup": 2, "floor": 0.1})  # at rate 0 nothing moves either
    facts = run.finish(faults=[{"point": "train.loss", "rank": 1, "step": 6, "action": "nan"}]).made.read_json(
        "training.json"
    )
    assert facts["skipped_steps"] == 1
    losses = {each["step"]: each["loss"] for each in facts["validations"]}
    assert [step for step in range(2, 9) if losses[step] == losses[step - 1]] == [6]


@full
def test_lisa_goes_on_in_mid_interval_with_the_same_layers(pretraining: Callable[..., Any]) -> None:
    """Drawn at 0, 4 and 8, killed at 7 with a checkpoint at 6."""
    changes = {
        "steps": 10,
        "model": {"width": 32, "layers": 3, "heads": 2, "ffn_width": 44},
        "lisa": {"enabled": True, "layers": 1, "interval": 4},
        "checkpoint": {"every": 3, "keep": 2},
    }
    quiet = pretraining(**changes)
    quiet.root = quiet.root / "quiet"
    quiet.root.mkdir()
    oracle = quiet.finish()
    run = pretraining(**changes)
    assert run.attempt(faults=[{"point": "train.after_step", "rank": 0, "step": 7, "action": "SIGKILL"}]).code == 4
    finished = run.finish()
    assert finished.resumed_at == [6]
    assert finished.losses == oracle.losses
    assert finished.files == oracle.files


@full
def test_a_spike_on_one_rank_takes_all_back_and_a_kill_after_that_changes_no_bit(
    pretraining: Callable[..., Any],
) -> None:
    """Spiked at step 13 with checkpoints at 5 and 10; killed at step 12 of the second pass, before the next save."""
    changes = {"spike": {"factor": 2.0, "window": 5}}
    spike = {"point": "train.loss", "rank": 1, "step": 13, "action": "scale", "factor": 50.0}
    quiet = pretraining(**changes)
    quiet.root = quiet.root / "quiet"
    quiet.root.mkdir()
    oracle = quiet.finish(faults=[spike])
    (made,) = oracle.made.read_json("training.json")["rollbacks"]
    assert (made["step"], made["spiked_at"], made["samples"]) == (10, 13, 24)
    run = pretraining(**changes)
    kill = {"point": "train.after_step", "rank": 0, "step": 12, "nth": 2, "action": "SIGKILL"}
    assert run.attempt(faults=[spike, kill]).code == 4
    finished = run.finish()
    assert finished.resumed_at == [10]
    assert_same(finished, oracle)
