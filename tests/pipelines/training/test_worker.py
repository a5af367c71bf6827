"""One rank, in this process: same bytes twice, exact resume, models that plain transformers loads, exit codes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from models.architectures.build import build
from pipelines.core.artifact import Artifact
from pipelines.core.errors import NumericError, Preempted
from pipelines.training.distributed import Ranks
from pipelines.training.metrics import read_records
from pipelines.training.worker import StopRequest
from pipelines.training.worker_spec import WorkerSpec

Run = Callable[..., int]
MakeSpec = Callable[..., WorkerSpec]
FAMILIES = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM}


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def plan(*faults: dict[str, Any]) -> None:
        path = tmp_path / "faults.json"
        path.write_text(json.dumps(faults))
        monkeypatch.setenv("INGOT_FAULTS", str(path))

    return plan


def facts(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return result


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "model").iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_settings_give_the_same_bytes(family: str, run_plain: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        assert run_plain(tmp_path / name, family=family) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert facts(tmp_path / "a") == facts(tmp_path / "b")


def test_another_seed_gives_another_model(run_plain: Run, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert run_plain(tmp_path / str(seed), seed=seed) == 0
    assert digest(tmp_path / "0")["model.safetensors"] != digest(tmp_path / "1")["model.safetensors"]


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_compute_again_train_the_same_bytes(family: str, kind: str, run_plain: Run, tmp_path: Path) -> None:
    """With LISA also below the lowest layer that trains, whose inputs need no gradient."""
    changes = {"family": family, "lisa": {"layers": 1, "interval": 2}}
    assert run_plain(tmp_path / "kept", **changes) == 0
    assert run_plain(tmp_path / kind, **changes, activation_checkpointing=kind) == 0
    assert digest(tmp_path / kind)["model.safetensors"] == digest(tmp_path / "kept")["model.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_loads_in_plain_transformers_and_has_the_recorded_loss(
    family: str, run_plain: Run, plain_spec: MakeSpec, tmp_path: Path, prepared: Artifact
) -> None:
    assert run_plain(tmp_path, family=family, validation_sequences=100) == 0
    model = FAMILIES[family].from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == facts(tmp_path)["parameters"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 61
    spec = plain_spec(tmp_path, family=family)
    nats, targets = validation_by_hand(spec, model)
    assert nats / targets == pytest.approx(facts(tmp_path)["validation_loss"], rel=1e-6)


def validation_by_hand(spec: WorkerSpec, model: Any) -> tuple[float, int]:
    """Sum the nats of every validation target, one sequence at a time, on plain logits; no token sees padding."""
    import numpy as np

    from models.architectures.config import IGNORED
    from pipelines.data.shards import ShardReader
    from pipelines.training.data_loader import VALIDATION_EPOCH, Batch
    from pipelines.training.loss_module import make_objective

    reader = ShardReader(spec.data, "validation")
    objective = make_objective(spec.config, spec.architecture)
    nats, count = 0.0, 0
    for number in range(len(reader)):
        samples, epochs = np.array([number]), np.array([VALIDATION_EPOCH])
        batch = Batch.of(*objective.targets(reader.take(samples), samples, epochs), 2)
        with torch.no_grad():
            seen_BT = (batch.inputs_BT != spec.index["pad_id"]).long()
            chances = model(input_ids=batch.inputs_BT, attention_mask=seen_BT).logits.log_softmax(-1)[0]
        for position, target in enumerate(batch.targets_BT[0].tolist()):
            if target != IGNORED:
                nats -= chances[position, target].item()
                count += 1
    return nats, count


def test_a_decoder_generates(run_plain: Run, tmp_path: Path) -> None:
    assert run_plain(tmp_path) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    written = model.generate(torch.tensor([[0, 5]]), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 2
    assert model.generation_config.eos_token_id == 1


def test_training_moves_every_weight_and_lowers_the_loss(run_plain: Run, plain_spec: MakeSpec, tmp_path: Path) -> None:
    assert run_plain(tmp_path, steps=40, optimizer={"lr": 0.05}) == 0
    spec = plain_spec(tmp_path)
    start = build(spec.config.architecture(spec.index), seed=spec.config.seed).state_dict()
    final = load_file(tmp_path / "model" / "model.safetensors")
    assert all(not torch.equal(start[name], tensor) for name, tensor in final.items())
    assert facts(tmp_path)["validation_loss"] < 0.9 * math.log(61)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"name": "adamw"}, "family": "encoder"},
        {"lisa": {"enabled": True, "layers": 1, "interval": 4, "weights": "norm"}},
        {"lisa": {"enabled": True, "layers": 1, "interval": 1, "weights": "measured", "measured": [0.0, 0.7, 0.3]}},
        {"optimizer": {"name": "lars"}, "lisa": {"enabled": True, "layers": 2, "interval": 3}, "log_every": 2},
    ],
)
@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    stop_after: int,
    changes: dict[str, Any],
    run_plain: Run,
    faults: Callable[..., None],
    tmp_path: Path,
) -> None:
    assert run_plain(tmp_path / "quiet", **changes) == 0
    faults({"point": "train.after_step", "step": stop_after, "action": "SIGTERM"})
    assert run_plain(tmp_path / "stopped", **changes) == Preempted.exit_code
    assert not (tmp_path / "stopped" / "training.json").exists()
    assert run_plain(tmp_path / "stopped", **changes) == 0
    assert digest(tmp_path / "stopped") == digest(tmp_path / "quiet")
    assert facts(tmp_path / "stopped") == facts(tmp_path / "quiet")
    assert (tmp_path / "stopped" / "samples.jsonl").read_bytes() == (tmp_path / "quiet" / "samples.jsonl").read_bytes()
    steps = [record["step"] for record in read_records(tmp_path / "stopped" / "metrics.jsonl")]
    assert steps == [record["step"] for record in read_records(tmp_path / "quiet" / "metrics.jsonl")]
    assert json.loads((tmp_path / "stopped" / "observations.json").read_text())["resumed_at"] == [stop_after]


def test_a_crash_between_checkpoints_repeats_the_lost_steps_exactly(
    run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    """Before the checkpoint of step 6 is begun, that of step 4 is complete."""
    assert run_plain(tmp_path / "quiet", steps=7) == 0
    faults({"point": "checkpoint.before_write", "step": 6, "action": "raise"})
    with pytest.raises(RuntimeError, match="injected"):
        run_plain(tmp_path / "crashed", steps=7)
    assert run_plain(tmp_path / "crashed", steps=7) == 0
    assert facts(tmp_path / "crashed") == facts(tmp_path / "quiet")
    assert digest(tmp_path / "crashed") == digest(tmp_path / "quiet")
    assert (tmp_path / "crashed" / "samples.jsonl").read_bytes() == (tmp_path / "quiet" / "samples.jsonl").read_bytes()
    assert json.loads((tmp_path / "crashed" / "observations.json").read_text())["resumed_at"] == [4]


def test_a_non_finite_step_changes_nothing_and_training_goes_on(
    run_plain: Run, faults: Callable[..., None], tmp_path: Path
) -> None:
    faults({"point": "train.loss", "step": 4, "action": "nan"})
    assert run_plain(tmp_path) == 0
    result = facts(tmp_path)
    assert result["skipped_steps"] == 1
    assert [math.isfinite(float.fromhex(loss)) for loss in result["losses"]] == [True] * 3 + [False] + [True] * 2
    record = read_records(tmp_path / "metrics.jsonl")[3]
    assert (record["step"], record["loss"], record["grad_norm"], record["skipped"]) == (4, None, None, 1)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not (tmp_path / "checkpoints" / "step-00000004").exists()


def test_too_many_non_finite_steps_end_the_run_with_a_diagnosis(
    run_plain: Run,
    plain_spec: MakeSpec,
    faults: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults(*({"point": "train.loss", "step": step, "action": "nan"} for step in (3, 4, 5)))
    assert run_plain(tmp_path, max_skipped=1) == NumericError.exit_code
    message = capsys.readouterr().err
    assert "step 4 was not finite, 2 in a row with it; pretrain.max_skipped = 1" in message
    diagnosis = json.loads((tmp_path / "diagnostics" / "step-4.json").read_text())
    assert diagnosis["loss_by_rank"] == ["nan"]
    assert diagnosis["last_checkpoint"] == 2
    assert diagnosis["sample_ids"] == expected_ids(plain_spec(tmp_path), step=3)
    assert not (tmp_path / "training.json").exists()


def expected_ids(spec: WorkerSpec, step: int) -> list[int]:
    from pipelines.training.data_order import ids

    found: list[int] = ids(spec.config.seed, step * spec.config.batch_size, spec.config.batch_size, 90)[0].tolist()
    return found


def test_metrics_tell_what_a_user_watches(
    run_plain: Run, plain_spec: Callable[..., WorkerSpec], tmp_path: Path
) -> None:
    from pipelines.data.shards import ShardReader

    assert run_plain(tmp_path) == 0
    spec = plain_spec(tmp_path)
    rows = [ShardReader(spec.data, "train").take(expected_ids(spec, step)) for step in range(6)]
    tokens = np.cumsum([np.count_nonzero(each != 2) for each in rows]).tolist()
    assert tokens[-1] < 6 * 8 * 24  # padding is no token that was seen
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in records] == tokens
    for record in records:
        assert record["tokens_per_s"] > 0
        assert 0 < record["mfu"] < 1
        assert record["memory_bytes"] > 1e7
        assert all(record[f"time/{part}"] > 0 for part in ("forward", "backward", "step"))
        assert record["time/data"] >= 0  # after a validation and a sample the next batch has long been made
        assert {key for key in record if key.startswith("trust/")} == {
            "trust/embedding",
            "trust/layer.0",
            "trust/layer.1",
            "trust/layer.2",
        }
    for key in ("val/loss", "time/validate", "time/sample"):
        assert [record["step"] for record in records if key in record] == [3, 6]
    exact = facts(tmp_path)["losses"]
    assert [record["loss"].hex() for record in records] == exact


def test_the_learning_rate_warms_up_and_decays_towards_its_floor(run_plain: Run, tmp_path: Path) -> None:
    assert run_plain(tmp_path, schedule={"warmup": 2, "decay": "linear", "floor": 0.1}, optimizer={"lr": 0.5}) == 0
    rates = [record["lr"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.3875, 0.275, 0.1625])


def test_lines_of_metrics_can_be_fewer_but_facts_are_the_same(run_plain: Run, tmp_path: Path) -> None:
    assert run_plain(tmp_path / "all") == 0
    assert run_plain(tmp_path / "few", log_every=4) == 0
    assert [r["step"] for r in read_records(tmp_path / "few" / "metrics.jsonl")] == [3, 4, 6]
    assert facts(tmp_path / "few") == facts(tmp_path / "all")


def test_frozen_layers_keep_every_bit_until_they_are_drawn(
    run_plain: Run, plain_spec: MakeSpec, tmp_path: Path
) -> None:
    changes = {"lisa": {"enabled": True, "layers": 1, "interval": 6}, "optimizer": {"weight_decay": 0.5, "lr": 0.1}}
    assert run_plain(tmp_path, **changes) == 0
    (active,) = read_records(tmp_path / "metrics.jsonl")[0]["lisa/active"]
    spec = plain_spec(tmp_path)
    start = build(spec.config.architecture(spec.index), seed=0).state_dict()
    final = load_file(tmp_path / "model" / "model.safetensors")
    moved = {name for name, tensor in final.items() if not torch.equal(tensor, start[name])}
    expected = {name for name in final if ".layers." not in name or f".layers.{active}." in name}
    assert moved == expected


def test_bits_per_byte_are_nats_per_byte_over_log_two(run_plain: Run, tmp_path: Path, prepared: Artifact) -> None:
    assert run_plain(tmp_path) == 0
    result = facts(tmp_path)
    length = prepared.read_json("index.json")["sequence_length"]
    asked, written = length - 1, 3 * length  # of each document: its start is asked of nobody; bytes of its tokens
    assert result["bits_per_byte"] == pytest.approx(result["validation_loss"] / math.log(2) * asked / written)
    assert result["best_validation_loss"] <= result["validation_loss"]


def test_a_second_signal_is_remembered_as_one_request(run_plain: Run) -> None:
    stop = StopRequest()
    assert not stop()
    stop._receive(15, None)
    assert stop()


def test_a_rank_that_is_alone_sums_to_itself() -> None:
    alone = Ranks.current(torch.device("cpu"))
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.summed([1.5, 2.0]) == [1.5, 2.0]
    assert alone.gathered(0.1) == [0.1]


def test_a_run_records_how_much_each_layer_grew_whatever_interrupts_it(
    run_plain: Run, plain_spec: MakeSpec, tmp_path: Path, faults: Callable[..., None]
) -> None:
    assert run_plain(tmp_path / "whole", optimizer={"lr": 0.05}) == 0
    found = facts(tmp_path / "whole")
    spec = plain_spec(tmp_path / "by-hand")
    before = dict(build(spec.config.architecture(spec.index), seed=spec.config.seed).named_parameters())
    after = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for layer in range(3):
        names = [name for name in before if f".layers.{layer}." in name]
        old, new = (
            sum(float(t[name].detach().double().norm()) for name in names) / len(names) for t in (before, after)
        )
        assert found["layer_norms"]["start"][layer] == pytest.approx(old, rel=1e-6)
        assert found["layer_norms"]["end"][layer] == pytest.approx(new, rel=1e-6)
    ratios = [e / s for s, e in zip(*found["layer_norms"].values(), strict=True)]
    assert found["layer_importance"] == pytest.approx([ratio / sum(ratios) for ratio in ratios], rel=1e-6)
    faults({"point": "train.after_step", "step": 3, "action": "SIGTERM"})
    assert run_plain(tmp_path / "cut", optimizer={"lr": 0.05}) == Preempted.exit_code
    assert run_plain(tmp_path / "cut", optimizer={"lr": 0.05}) == 0
    assert facts(tmp_path / "cut") == found


def test_layers_are_drawn_as_measured_on_another_run(run_plain: Run, tmp_path: Path) -> None:
    """Eighty draws of one layer: a layer of weight zero never, the others in proportion within three deviations."""
    measured = [0.0, 0.75, 0.25]
    settings = {"enabled": True, "layers": 1, "interval": 1, "weights": "measured", "measured": measured}
    run = {"lisa": settings, "steps": 80, "batch_size": 2, "validate_every": 80, "checkpoint": {"every": 80}}
    assert run_plain(tmp_path, **run) == 0
    drawn = [record["lisa/active"] for record in read_records(tmp_path / "metrics.jsonl")]
    counts = [drawn.count([layer]) for layer in range(3)]
    assert counts[0] == 0
    assert abs(counts[1] - 60) <= 3 * (80 * 0.75 * 0.25) ** 0.5
    assert sum(counts) == 80
