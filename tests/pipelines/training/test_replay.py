"""Doing a step again that was not finite: the same weights and data come back, and the first bad value is named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.core import fault_injection as injection
from pipelines.core.errors import ConfigError, IntegrityError, NumericError
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.metrics import read_records
from pipelines.training.replay import Watch, main, replay
from pipelines.training.worker import device_of, make_engine
from pipelines.training.worker_spec import WorkerSpec

Run = Callable[..., int]


@pytest.fixture
def spoilt(run_plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run with NaN injected into the loss of steps 5 and 6, which ends there; returns the last diagnosis."""

    def run(**changes: Any) -> Path:
        plan = tmp_path / "faults.json"
        plan.write_text(json.dumps([{"point": "train.loss", "step": n, "action": "nan"} for n in (5, 6)]))
        monkeypatch.setenv("INGOT_FAULTS", str(plan))
        monkeypatch.setattr(injection, "_visits", Counter())
        assert run_plain(tmp_path / "run", max_skipped=1, checkpoint={"every": 3}, **changes) == NumericError.exit_code
        monkeypatch.delenv("INGOT_FAULTS")
        return tmp_path / "run" / "diagnostics" / "step-6.json"

    return run


def spoil(spec: WorkerSpec, step: int, tensor: str) -> None:
    """Publish a checkpoint of another step, like the newest but with one infinite weight."""
    engine = make_engine(spec, device_of(spec))
    checkpoints = Checkpoints(spec.checkpoints, 3)
    state = checkpoints.load(checkpoints.steps()[-1], engine.optimizer)
    (fragment,) = (each for each in engine.optimizer.fragments if each.name.endswith(tensor))
    fragment.master[7] = float("inf")
    checkpoints.save(step, engine.optimizer, {**state, "step": step}, rank=0, world=1)


def describe(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize("changes", [{}, {"lisa": {"enabled": True, "layers": 1, "interval": 5}}], ids=["all", "lisa"])
def test_the_step_is_done_again_from_the_same_weights_on_the_same_samples(
    changes: dict[str, Any], spoilt: Callable[..., Path], run_plain: Run, tmp_path: Path
) -> None:
    """What was NaN by injection comes out as a step on the weights that step 4 left: nothing but it was wrong."""
    path = spoilt(**changes)
    described = path.read_text()
    report = replay(path)
    assert (report.step, report.checkpoint, report.again) == (6, 3, 1)
    assert report.finite
    assert sorted(n for piece in report.micro_batches for n in piece.samples) == sorted(report.recorded["sample_ids"])
    assert "All is finite here: look at the memory, device and network of the run; it was rank 0." in report.lines()
    resumed = run_plain(tmp_path / "run", max_skipped=1, checkpoint={"every": 3}, **changes)
    assert resumed == 0  # the fault has passed: the loss of the quiet fifth step is the one of a replay of it
    assert not list(path.parent.iterdir())  # steps that were taken anew without a fault are nobody's skipped steps
    path.write_text(described)
    losses = {record["step"]: record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")}
    fifth = replay(describe(path, step=5, sample_ids=[]))
    targets = sum(piece.targets for piece in fifth.micro_batches)
    again = sum(piece.nats_per_target * piece.targets for piece in fifth.micro_batches) / targets
    assert again == pytest.approx(losses[5], rel=1e-6)


def test_a_replay_trusts_no_description_of_an_earlier_attempt(
    run_plain: Run, spoilt: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 was skipped in the first attempt and trained in the second, where 6 and 7 fail: 5 is trained again."""
    spoilt()
    plan = tmp_path / "later.json"  # a plan of its own: a fault fires once in its life
    plan.write_text(json.dumps([{"point": "train.loss", "step": n, "action": "nan"} for n in (6, 7)]))
    monkeypatch.setenv("INGOT_FAULTS", str(plan))
    monkeypatch.setattr(injection, "_visits", Counter())
    assert run_plain(tmp_path / "run", max_skipped=1, steps=9, checkpoint={"every": 3}) == NumericError.exit_code
    assert sorted(path.stem for path in (tmp_path / "run" / "diagnostics").iterdir()) == ["step-6", "step-7"]
    monkeypatch.delenv("INGOT_FAULTS")
    assert replay(tmp_path / "run" / "diagnostics" / "step-7.json").again == 2


def test_ranks_are_told_apart_by_the_order_of_the_micro_batches(spoilt: Callable[..., Path], tmp_path: Path) -> None:
    path = spoilt()
    spec_path = tmp_path / "run" / "worker_spec.json"
    spec = WorkerSpec.model_validate_json(spec_path.read_text())
    many = spec.config.model_copy(update={"world_size": 2, "engine": "deepspeed", "zero_stage": 2})
    spec_path.write_text(spec.model_copy(update={"config": many}).model_dump_json())
    assert [piece.rank for piece in replay(path).micro_batches] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("tensor", "module"),
    [("layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj"), ("layers.2.self_attn.v_proj.weight", "v_proj")],
)
def test_the_first_module_that_is_not_finite_is_named(
    tensor: str, module: str, spoilt: Callable[..., Path], tmp_path: Path
) -> None:
    path = spoilt()
    spec = WorkerSpec.model_validate_json((tmp_path / "run" / "worker_spec.json").read_text())
    spoil(spec, 4, tensor)
    report = replay(describe(path, last_checkpoint=4))
    assert not report.finite
    assert report.output is not None
    assert report.output.endswith(module)
    assert [name.endswith(tensor) for name in report.weights] == [True]
    assert report.gradient is not None
    text = "\n".join(report.lines())
    assert f"first output that is not finite: {report.output}" in text
    assert "All is finite" not in text


class Root(nn.Module):
    """Finite forwards, and at zero an infinite slope: the gradient breaks where nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.before(x).sqrt())
        return result


def test_a_gradient_that_breaks_on_the_way_back_is_named_though_every_output_is_finite() -> None:
    model, watch = Root(), Watch()
    with torch.no_grad():
        model.before.weight.zero_()
    watch(model)
    model(torch.ones(2, 3)).sum().backward()
    watch.stop()
    assert watch.output is None
    assert watch.gradient == "before.weight"
    model.before.weight.data.fill_(float("nan"))
    model(torch.ones(2, 3))
    assert watch.output is None  # nobody watches any more


def test_a_replay_changes_no_file_of_the_run(spoilt: Callable[..., Path], tmp_path: Path) -> None:
    path = spoilt()
    before = {each: each.read_bytes() for each in sorted((tmp_path / "run").rglob("*")) if each.is_file()}
    replay(path)
    assert {each: each.read_bytes() for each in sorted((tmp_path / "run").rglob("*")) if each.is_file()} == before


def test_what_cannot_be_replayed_is_said(spoilt: Callable[..., Path], tmp_path: Path) -> None:
    path = spoilt()
    with pytest.raises(ConfigError, match="is not the diagnosis of a run"):
        replay(tmp_path / "run" / "diagnostics" / "step-7.json")
    shard = tmp_path / "run" / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"the checkpoint of step 3 .* cannot be used"):
        replay(path)
    assert shard.parent.is_dir()  # not set aside: that is for the run to do


def test_the_command_that_the_failed_run_prints_works(
    spoilt: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoilt()
    command = capsys.readouterr().err.strip().splitlines()[-1].partition("where it breaks: ")[2]
    assert command == f"python -m pipelines.training.replay {path}"
    assert main(command.split()[3:]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "step 6, from the checkpoint of step 3 and 1 steps trained again\nmicro batch 0 (rank 0; sam"
    )
    assert main([]) == ConfigError.exit_code
