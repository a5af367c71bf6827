"""Engines: the plain one against a loop written by hand, the DeepSpeed one against what a library may make of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.objectives.causal import next_tokens
from pipelines.core.launcher import launch
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Batch
from pipelines.training.engine import PlainEngine, create, deepspeed_settings, set_lr
from pipelines.training.loss_module import LossModule
from pipelines.training.optimizer_config import OptimizerConfig
from pipelines.training.optimizers import learning_rate, make_optimizer

CPU = torch.device("cpu")
ARCHITECTURE = ArchitectureConfig.model_validate(
    {"family": "decoder", "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "vocab_size": 31}
    | {"max_positions": 12, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
)


def config(**changes: Any) -> PretrainConfig:
    values = {"engine": "plain", "world_size": 1, "zero_stage": 0, "steps": 10, "schedule": {"warmup": 2}}
    return PretrainConfig.model_validate({**values, **changes})


def plain(settings: PretrainConfig) -> PlainEngine:
    made = create(settings, LossModule(build(ARCHITECTURE, seed=0)), lambda named: make_optimizer(settings, named), CPU)
    assert isinstance(made, PlainEngine)
    return made


def batches(step: int) -> list[Batch]:
    """Two micro batches with unequal numbers of targets."""
    tokens = np.random.Generator(np.random.Philox(step)).integers(4, 31, (4, 12))
    tokens[0, 4:] = 2
    return [Batch.of(part, next_tokens(part, bos_id=0, pad_id=2), 2) for part in (tokens[:2], tokens[2:])]


def test_the_plain_engine_trains_as_a_loop_written_by_hand() -> None:
    settings = config(optimizer={"name": "adamw", "lr": 0.01, "clip": 0.1, "weight_decay": 0.0})
    engine = plain(settings)
    model = build(ARCHITECTURE, seed=0)
    by_hand = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(10):
        parts = batches(step)
        targets = sum(part.targets for part in parts)
        for number, part in enumerate(parts, start=1):
            engine.backward(engine.loss(part) / targets, last=number == len(parts))
        record = engine.step(learning_rate(settings, step))

        tokens = torch.cat([part.inputs_BT for part in parts])
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        set_lr(by_hand, learning_rate(settings, step))
        by_hand.step()
        by_hand.zero_grad()
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert not record.skipped
    for (name, ours), theirs in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0, msg=name)


def test_gradients_of_micro_batches_add_up_and_are_cleared_by_the_step() -> None:
    engine = plain(config())
    parts = batches(0)
    engine.backward(engine.loss(parts[0]), last=False)
    first = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
    engine.backward(engine.loss(parts[0]), last=True)
    second = [p.grad for p in engine.module.parameters() if p.grad is not None]
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, 2 * one)
    engine.step(0.1)
    assert all(p.grad is None for p in engine.module.parameters())


def test_bf16_computes_coarsely_and_keeps_float32_masters() -> None:
    exact, coarse = plain(config()), plain(config(precision="bf16"))
    batch = batches(0)[1]
    losses = exact.loss(batch).item(), coarse.loss(batch).item()
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert {parameter.dtype for parameter in coarse.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["lamb", "adamw", "lars"])
def test_the_configured_rule_is_used_with_its_settings(name: str) -> None:
    betas = (0.8, OptimizerConfig().betas[1]) if name == "lars" else (0.8, 0.9)  # lars has the first moment only
    settings = config(optimizer={"name": name, "lr": 0.3, "weight_decay": 0.2, "clip": None, "betas": betas})
    optimizer = make_optimizer(settings, list(build(ARCHITECTURE, seed=0).named_parameters()))
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__.lower() == name
    assert (group["lr"], group["weight_decay"], optimizer.max_grad_norm) == (0.3, 0.2, None)
    assert group.get("betas", (0.8, 0.9)) == (0.8, 0.9)
    assert group.get("momentum", 0.8) == 0.8


def test_with_lisa_each_layer_is_a_group() -> None:
    named = list(build(ARCHITECTURE, seed=0).named_parameters())
    assert len(make_optimizer(config(), named).param_groups) == 1
    assert len(make_optimizer(config(lisa={"enabled": True}), named).param_groups) == 3


def test_deepspeed_is_told_everything_and_left_nothing_to_guess() -> None:
    settings = deepspeed_settings(PretrainConfig(batch_size=48, micro_batch_size=4, world_size=3, zero_stage=1), 1000)
    assert settings["train_batch_size"] == 48
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["round_robin_gradients"] is False
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1024
    assert "auto" not in json.dumps(settings)
    assert "offload_optimizer" not in settings["zero_optimization"]


def test_offload_is_asked_of_deepspeed_and_refused_without_sharding() -> None:
    settings = deepspeed_settings(PretrainConfig(offload=True), 1000)
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ValueError, match="only sharded state can be offloaded; valid: 1, 2, 3"):
        PretrainConfig(offload=True, zero_stage=0)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one real rank was given and refused; see engine_worker.py."""
    folder = tmp_path_factory.mktemp("engine")
    script = Path(__file__).with_name("engine_worker.py")
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launch([sys.executable, str(script), str(folder / "out.json")], world_size=1, log_dir=folder, env=environment)
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


@pytest.mark.slow
def test_accelerate_gives_a_deepspeed_engine_without_the_shared_memory_build(given: dict[str, Any]) -> None:
    assert given["type"] == "DeepSpeedEngine"
    assert given["shm_comm"] is False
    assert given["clipping"] == 0.0


@pytest.mark.slow
def test_deepspeed_meets_at_a_store_that_only_this_machine_reaches(given: dict[str, Any]) -> None:
    assert given["store_listens"]
    assert given["listens_on"] == ["127.0.0.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("use_cpu", "ACCELERATE_USE_CPU is set: Accelerate would drop DeepSpeed"),
        ("world", "ranks in the process group is 1, the configuration says 2"),
        ("stage", "engine's ZeRO stage is 2, the configuration says 3"),
        ("batch", "engine's batch size is 6, the configuration says 12"),
        ("no_engine", "Accelerate prepared a Sum, not a DeepSpeed engine"),
        ("same", None),
    ],
)
def test_an_engine_that_is_not_the_one_asked_for_is_refused(
    case: str, message: str | None, given: dict[str, Any]
) -> None:
    assert given[case] == message if message is None else message in given[case]
