"""The stage with real ranks: every ZeRO stage trains what one plain process trains, whatever happens."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, NumericError, Preempted
from pipelines.core.stage import Progress, StageContext
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import read_records
from pipelines.training.stage import environment, make_worker_spec, progress, run

pytestmark = pytest.mark.timeout(600)

NORM_LISA = {"enabled": True, "layers": 1, "interval": 2, "weights": "norm"}
CASES: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_stage": 0},
    "zero-1": {"zero_stage": 1, "optimizer": {"name": "adamw", "clip": 0.5}, "profile": {"start": 3, "steps": 2}},
    "zero-2": {"zero_stage": 2, "lisa": NORM_LISA, "activation_checkpointing": "full"},
    "phases": {
        "zero_stage": 2,
        "phases": [
            {"steps": 4, "sequence_length": 12, "batch_size": 8, "batch_warmup": {"start": 4, "steps": 2}},
            {"steps": 2, "batch_size": 4, "micro_batch_size": 1, "schedule": {"warmup": 1}},
        ],
    },
    "zero-3-decoder": {"zero_stage": 3, "activation_checkpointing": "selective"},
    "zero-3": {
        "zero_stage": 3,
        "family": "encoder",
        "lisa": {**NORM_LISA, "weights": "uniform"},
        "activation_checkpointing": "full",
    },
}
ONLY_SHARDED = {"zero_stage", "activation_checkpointing", "profile"}
"""What the plain process does without: it keeps all activations."""


@dataclass
class Attempt:
    """One call of the stage."""

    folder: Path
    reports: list[Progress] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def facts(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.out / "training.json").read_text())
        return result

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "model" / "model.safetensors")

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.out / "model" / "model.safetensors").read_bytes()).hexdigest()

    def losses(self) -> list[float]:
        return [float.fromhex(loss) for loss in self.facts["losses"]]


Stage = Callable[..., Attempt]


@pytest.fixture(scope="module")
def stage(prepared: Artifact) -> Stage:
    """Run the stage in a folder with one thread per rank; a second call in the same folder goes on."""

    def call(folder: Path, config: dict[str, Any]) -> Attempt:
        attempt = Attempt(folder)
        (folder / "out").mkdir(parents=True, exist_ok=True)
        context = StageContext("pretrain", folder / "scratch", attempt.reports.append, ComputeConfig(device="cpu"))
        settings = PretrainConfig.model_validate(config)
        attempt.summary = run(settings, {"prepare": prepared}, attempt.out, context)
        return attempt

    return call


@pytest.fixture(scope="module")
def attempts(
    stage: Stage, tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Attempt]:
    """One undisturbed run for each ZeRO stage."""
    root = tmp_path_factory.mktemp("zero")
    return {case: stage(root / case, {**tiny_settings, **changes}) for case, changes in CASES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_under_deepspeed_train_what_one_plain_process_trains(
    case: str, attempts: dict[str, Attempt], run_plain: Callable[..., int], tmp_path: Path
) -> None:
    assert run_plain(tmp_path, **{k: v for k, v in CASES[case].items() if k not in ONLY_SHARDED}) == 0
    plain, sharded = load_file(tmp_path / "model" / "model.safetensors"), attempts[case].weights
    assert plain.keys() == sharded.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-5, rtol=0, msg=name)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert attempts[case].losses() == pytest.approx([float.fromhex(x) for x in facts["losses"]], rel=1e-5)
    ours, theirs = (read_records(p / "metrics.jsonl") for p in (attempts[case].out, tmp_path))
    assert read_records(attempts[case].out / "samples.jsonl") == read_records(tmp_path / "samples.jsonl")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("lisa/active") == other.get("lisa/active")
        shared = [key for key in other if key.startswith("trust/") or key in ("grad_norm", "val/loss")]
        assert {key: mine[key] for key in shared} == pytest.approx({key: other[key] for key in shared}, rel=1e-4)


@pytest.mark.slow
def test_the_artifact_holds_model_facts_metrics_and_observations(attempts: dict[str, Attempt]) -> None:
    attempt = attempts["zero-2"]
    names = {path.relative_to(attempt.out).as_posix() for path in attempt.out.rglob("*") if path.is_file()}
    assert {"model/config.json", "model/model.safetensors", "model/generation_config.json"} < names
    assert {"model/tokenizer.json", "training.json", "metrics.jsonl", "observations.json", "samples.jsonl"} < names
    assert attempt.summary["steps"] == 6
    assert attempt.summary["parameters"] == attempt.facts["parameters"]
    observed = json.loads((attempt.out / "observations.json").read_text())
    assert observed["resumed_at"] == []
    assert observed["checkpoint_fallbacks"] == 0


@pytest.mark.slow
def test_a_profile_traces_its_steps_and_no_others(attempts: dict[str, Attempt]) -> None:
    folder = attempts["zero-1"].out / "profile"
    with gzip.open(folder / "trace.json.gz", "rt") as trace:
        events = json.load(trace)["traceEvents"]
    assert {e["name"] for e in events if str(e.get("name", "")).startswith("step ")} == {"step 4", "step 5"}
    assert "aten::mm" in (folder / "operations.txt").read_text()
    assert not (attempts["zero-2"].out / "profile").exists()


@pytest.mark.slow
def test_every_step_is_reported_once_with_loss_rate_and_time_left(attempts: dict[str, Attempt]) -> None:
    reports = attempts["zero-0"].reports
    assert [report.done for report in reports] == [1, 2, 3, 4, 5, 6]
    assert {(report.node, report.total, report.unit) for report in reports} == {("pretrain", 6, "steps")}
    assert all("loss " in report.message and "tokens/s" in report.message for report in reports)
    assert "validation" in reports[2].message
    assert [report.metrics["loss"] for report in reports] == attempts["zero-0"].losses()
    assert "trust/layer.0" in reports[0].metrics


@pytest.mark.slow
def test_a_preempted_run_resumes_to_the_same_bytes(
    attempts: dict[str, Attempt],
    stage: Stage,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank gets SIGTERM in mid-interval of LISA; both stop after the same step."""
    plan = tmp_path / "faults.json"
    plan.write_text(json.dumps([{"point": "train.after_step", "rank": 1, "step": 3, "action": "SIGTERM"}]))
    monkeypatch.setenv("INGOT_FAULTS", str(plan))
    config = {**tiny_settings, **CASES["zero-2"]}
    with pytest.raises(Preempted):
        stage(tmp_path / "run", config)
    assert (tmp_path / "run/scratch/checkpoints/step-00000003/manifest.json").exists()
    again = stage(tmp_path / "run", config)
    quiet = attempts["zero-2"]
    assert again.facts == quiet.facts
    assert again.digest == quiet.digest
    assert [record["step"] for record in read_records(again.out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((again.out / "observations.json").read_text())["resumed_at"] == [3]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all_and_diagnosed(
    stage: Stage, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "faults.json"
    faults = [{"point": "train.loss", "rank": 1, "step": step, "action": "nan"} for step in (2, 4, 5)]
    plan.write_text(json.dumps(faults))
    monkeypatch.setenv("INGOT_FAULTS", str(plan))
    with pytest.raises(NumericError, match=r"step 5 was not finite, 2 in a row"):
        stage(tmp_path / "run", {**tiny_settings, "max_skipped": 1, "checkpoint": {"every": 1}})
    diagnosis = json.loads((tmp_path / "run/scratch/diagnostics/step-5.json").read_text())
    first, second = diagnosis["loss_by_rank"]
    assert float(first) > 0
    assert second == "nan"
    assert len(diagnosis["sample_ids"]) == 8
    assert diagnosis["last_checkpoint"] == 3
    assert [r["skipped"] for r in read_records(tmp_path / "run/scratch/metrics.jsonl")] == [0, 1, 1, 2]


@pytest.mark.slow
def test_a_finished_run_is_laid_out_again_without_training_unless_it_was_another_order(
    stage: Stage, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = {**tiny_settings, "engine": "plain", "world_size": 1, "zero_stage": 0}
    trained = stage(tmp_path, plain)
    kept = trained.digest
    assert [report.done for report in trained.reports] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(trained.out)
    again = stage(tmp_path, plain)
    assert again.reports == []
    assert again.digest == kept
    shutil.rmtree(again.out)
    other = stage(tmp_path, {**plain, "micro_batch_size": 1})
    assert json.loads((other.out / "observations.json").read_text())["resumed_at"] == [6]
    assert other.digest == kept


def test_a_model_that_does_not_fit_the_tokenizer_is_refused(prepared: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "prepare"
    broken.mkdir()
    (broken / "index.json").write_text(json.dumps({**prepared.read_json("index.json"), "mask_id": 61}))
    found = Artifact(broken, prepared.manifest)
    with pytest.raises(ConfigError, match="mask_id = 61 is outside the vocabulary"):
        make_worker_spec(PretrainConfig(), found, StageContext("pretrain", tmp_path / "scratch"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(prepared: Artifact, tmp_path: Path) -> None:
    context = StageContext("pretrain", tmp_path, compute=ComputeConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"compute\.device = cuda: 0 GPUs for 2 ranks"):
        make_worker_spec(PretrainConfig(), prepared, context)


def test_threads_are_identity_that_a_run_may_go_on_without(prepared: Artifact, tmp_path: Path) -> None:
    """Sums over many elements are cut by threads: another number of them rounds in another order."""
    one, three = PretrainConfig(), PretrainConfig(threads=3)
    spec = make_worker_spec(three, prepared, StageContext("pretrain", tmp_path, compute=ComputeConfig(device="cpu")))
    assert environment(spec)["OMP_NUM_THREADS"] == environment(spec)["MKL_NUM_THREADS"] == "3"
    assert environment(spec)["DS_ACCELERATOR"] == "cpu"
    assert one.identity() != three.identity()
    assert one.resume_key() == three.resume_key()


def test_a_progress_line_shows_loss_rate_and_time_left() -> None:
    record = {"step": 30, "loss": 2.5, "tokens_per_s": 2048.4, "lisa/active": [1], "val/loss": 3.0}
    shown = progress(record, 100, "pretrain", 1.0)
    assert shown.message == "loss 2.5000, validation 3.0000, 2,048 tokens/s, 1 min 10 s left"
    assert shown.metrics == {"step": 30.0, "loss": 2.5, "tokens_per_s": 2048.4, "val/loss": 3.0}


def test_a_progress_line_says_when_a_loss_is_not_finite() -> None:
    shown = progress({"step": 1, "loss": None, "tokens_per_s": 1.0}, 8000, "pretrain", 2.0)
    assert shown.message.startswith("loss not finite, 1 tokens/s, 4 h 27 min left")
    assert "loss" not in shown.metrics
