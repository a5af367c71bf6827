"""Going back from a loss spike: which data is left out, and runs that went back and end as if they never spiked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core import fault_injection as injection
from pipelines.core.errors import NumericError
from pipelines.training import data_order
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import read_records
from pipelines.training.phases import Phases, at, phases_of
from pipelines.training.rollbacks import Rollback, read, samples_left_out, write

Run = Callable[..., int]
CHANGES: dict[str, Any] = {
    "steps": 12,
    "checkpoint": {"every": 2, "keep": 2},
    "monitors": {"loss_spikes": {"factor": 2.0, "window": 3, "max_rollbacks": 2}},
    "schedule": {"warmup": 2, "floor": 0.1},
}
AT_9 = {"point": "train.loss", "step": 9, "action": "scale", "factor": 50.0}


def two_phases() -> Phases:
    """Ten steps whose batch doubles from 8 to 32, then six steps of 16."""
    growing = {"steps": 10, "batch_size": 32, "batch_warmup": {"start": 8, "steps": 6}}
    both = {"phases": [growing, {"steps": 6, "batch_size": 16}], "steps": 16, "schedule": {"warmup": 2}}
    return phases_of(PretrainConfig.model_validate({"world_size": 1, "micro_batch_size": 8, **both}))


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 8)), max_size=3))
def test_a_rollback_moves_the_data_of_its_phase_from_its_step_on(pairs: list[tuple[int, int]]) -> None:
    made = [Rollback(step, min(step + length, 16), 0, "loss_spikes", "") for step, length in pairs]
    phases = two_phases()
    batches = {step: at(phases, step).batch(step - at(phases, step).first) for step in range(16)}
    for step in range(16):
        phase = at(phases, step)
        lost = [k for r in made if r.step <= step for k in range(r.step, r.spiked_at) if at(phases, k) is phase]
        assert samples_left_out(phase, made, step) == sum(batches[k] for k in lost)


def test_the_data_since_the_checkpoint_is_never_seen_again() -> None:
    """Back from step 9 to 6: in one epoch, the samples of steps 6 to 9 come in no later step."""
    (phase,) = phases_of(PretrainConfig(world_size=1, batch_size=4, micro_batch_size=4, steps=100))
    made = [Rollback(6, 9, 3 * 4, "loss_spikes", "")]
    used = [data_order.ids(1, 4 * k + samples_left_out(phase, made, k), 4, 100)[0].tolist() for k in range(20)]
    plain = [data_order.ids(1, 4 * k, 4, 100)[0].tolist() for k in range(23)]
    assert used == plain[:6] + plain[9:]


def test_rollbacks_survive_the_disk(tmp_path: Path) -> None:
    assert read(tmp_path / "r.json") == []
    made = [Rollback(6, 9, 12, "loss_spikes", "too high"), Rollback(8, 11, 4, "loss_spikes", "")]
    write(tmp_path / "r.json", made)
    assert read(tmp_path / "r.json") == made
    assert Rollback.of(json.loads((tmp_path / "r.json").read_text())[0]) == made[0]


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def plan(*faults: dict[str, Any]) -> None:
        number = len(list(tmp_path.glob("faults-*.json")))
        path = tmp_path / f"faults-{number}.json"
        path.write_text(json.dumps(faults))
        monkeypatch.setenv("INGOT_FAULTS", str(path))
        monkeypatch.setattr(injection, "_visits", Counter())

    return plan


def facts(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return result


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"lisa": {"enabled": True, "layers": 1, "interval": 4}}], ids=["all", "lisa"])
def test_after_going_back_training_is_what_it_had_been_on_the_other_data(
    changes: dict[str, Any], run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    """The oracle knows the rollback from the start, and so never sees the data that spiked."""
    faults(AT_9)
    assert run_plain(tmp_path / "spiked", **CHANGES, **changes) == 0
    (made,) = facts(tmp_path / "spiked")["rollbacks"]
    assert (made["step"], made["spiked_at"], made["samples"]) == (6, 9, 3 * 8)
    assert made["monitor"] == "loss_spikes"
    assert re.match(r"the loss is [\d.]+, more than 2 times the median before it, [\d.]+$", made["reason"])
    faults()
    (tmp_path / "oracle").mkdir()
    write(tmp_path / "oracle" / "rollbacks.json", [Rollback.of(made)])
    assert run_plain(tmp_path / "oracle", **CHANGES, **changes) == 0
    assert facts(tmp_path / "spiked") == facts(tmp_path / "oracle")
    assert weights(tmp_path / "spiked") == weights(tmp_path / "oracle")
    assert run_plain(tmp_path / "quiet", **CHANGES, **changes) == 0
    quiet, spiked = (facts(tmp_path / name)["losses"] for name in ("quiet", "spiked"))
    assert [a == b for a, b in zip(quiet, spiked, strict=True)] == [True] * 6 + [False] * 6


def test_metrics_hold_every_step_once_and_count_the_rollbacks(
    run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    faults(AT_9)
    assert run_plain(tmp_path / "run", **CHANGES) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["rollbacks"] for record in records] == [0] * 6 + [1] * 6
    assert max(record["loss"] for record in records) < 6


@pytest.mark.parametrize(
    "kill",
    [
        {"point": "checkpoint.during_pruning", "step": 8},
        {"point": "train.after_rollback"},
        {"point": "train.after_step", "step": 7, "nth": 2},
        {"point": "train.after_step", "step": 10},
    ],
    ids=["amid going back", "right after it", "a step later", "past the spike"],
)
def test_a_crash_around_a_rollback_ends_with_the_same_bytes(
    kill: dict[str, Any], run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    faults(AT_9)
    assert run_plain(tmp_path / "whole", **CHANGES) == 0
    again = [{**AT_9, "nth": 1}] if kill["point"] == "checkpoint.during_pruning" else []
    faults(AT_9, {**kill, "action": "raise"})
    with pytest.raises(RuntimeError, match="injected"):
        run_plain(tmp_path / "killed", **CHANGES)
    faults(*again)  # before the rollback is on the disk, a spike that the data makes is simply met again
    assert run_plain(tmp_path / "killed", **CHANGES) == 0
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_checkpoint_that_training_spiked_right_after_is_not_trusted(
    run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    """Step 9 spikes one step after the checkpoint of 8, whose weights may be the reason: it is gone, 6 is loaded."""
    faults(AT_9, {"point": "train.after_rollback", "action": "raise"})
    with pytest.raises(RuntimeError, match="injected"):
        run_plain(tmp_path / "run", **CHANGES)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps() == [6]


def test_before_the_first_due_checkpoint_the_start_is_gone_back_to(
    run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    faults({**AT_9, "step": 5})
    assert run_plain(tmp_path / "run", **{**CHANGES, "checkpoint": {"every": 50}}) == 0
    (made,) = facts(tmp_path / "run")["rollbacks"]
    assert (made["step"], made["spiked_at"], made["samples"]) == (0, 5, 40)


def test_spikes_without_end_are_given_up_with_the_numbers(
    run_plain: Run, faults: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults(*({**AT_9, "nth": visit} for visit in (1, 2, 3)))
    assert run_plain(tmp_path / "run", **CHANGES) == NumericError.exit_code
    said = capsys.readouterr().err
    assert "step 9: the loss is" in said
    assert "after 2 rollbacks; pretrain.monitors.loss_spikes.max_rollbacks = 2" in said
    assert len(read(tmp_path / "run" / "rollbacks.json")) == 2


def test_nobody_goes_back_unless_asked_to(run_plain: Run, faults: Callable[..., None], tmp_path: Path) -> None:
    faults(AT_9)
    assert run_plain(tmp_path / "run", **{**CHANGES, "monitors": {}}) == 0
    assert facts(tmp_path / "run")["rollbacks"] == []
    assert max(float.fromhex(loss) for loss in facts(tmp_path / "run")["losses"]) > 100
    assert "rollbacks" not in read_records(tmp_path / "run" / "metrics.jsonl")[-1]
