"""The pretrain section: defaults that run, impossible values refused with value and range, what is identity."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.core import fingerprint
from pipelines.training.config import PretrainConfig
from pipelines.training.optimizer_config import OptimizerConfig

INDEX = {"vocab_size": 512, "sequence_length": 64, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 10}, r"batch_size = 10 is not a multiple of .* = 2 x 4 = 8; valid: 8, 16, 24"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"lisa": {"enabled": True, "layers": 5}}, r"lisa\.layers = 5; the model has 4 layers, valid: 1 to 4"),
        ({"lisa": {"weights": "measured"}}, "weights = measured with 0 measured numbers"),
        ({"lisa": {"measured": [1.0, 1.0]}}, "weights = uniform with 2 measured numbers"),
        ({"lisa": {"weights": "measured", "measured": [1.0, 0.0]}}, "lets fewer than 2 layers be drawn"),
        (
            {"lisa": {"enabled": True, "weights": "measured", "measured": [1.0, 1.0]}},
            r"lisa\.measured has 2 numbers; the model has 4 layers",
        ),
        ({"model": {"heads": 3}}, r"heads = 3 does not fit width = 256"),
        ({"model": {"depth": 3}}, "Extra inputs"),
        ({"family": "encoder", "model": {"kv_heads": 2}}, "one key head per head"),
        ({"preset": "5m"}, r"unknown preset '5m'; known: 0\.5m, 1m, 4m"),
        ({"steps": 10, "schedule": {"warmup": 10}}, r"schedule\.warmup = 10; of 10 steps, valid: 0 to 9"),
        ({"engine": "plain"}, "world_size = 2 must be 1 and zero_stage = 2 must be 0"),
        ({"zero_stage": 4}, "Input should be 0, 1, 2 or 3"),
        ({"optimizer": {"name": "sgd"}}, "'lamb', 'adamw' or 'lars'"),
        ({"optimizer": {"lr": 0.0}}, "greater than 0"),
        ({"optimizer": {"lr": float("inf")}}, "finite number"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "less than 1"),
        ({"optimizer": {"variant": "deepspeed", "clamp": (1.0, 2.0)}}, "variant = deepspeed says it"),
        ({"optimizer": {"variant": "apex", "bias_correction": False}}, "variant = apex says it"),
        ({"optimizer": {"name": "adamw", "variant": "apex"}}, "it goes with name = lamb"),
        ({"optimizer": {"clamp": (2.0, 1.0)}}, r"clamp = \[2\.0, 1\.0\] is no interval"),
        (
            {"family": "encoder", "objective_settings": {"mask": 0.9, "random": 0.2}},
            r"mask \+ random = 1\.1; together they may be at most 1",
        ),
        ({"checkpoint": {"keep": 1}}, "greater than or equal to 2"),
        ({"precision": "bf16", "zero_stage": 0}, "DeepSpeed keeps no fp32 masters there; valid: 1, 2, 3"),
        ({"precision": "fp16"}, "'fp32' or 'bf16'"),
    ],
)
def test_what_cannot_run_is_refused_with_value_and_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig.model_validate(values)


def test_the_defaults_run_two_ranks_under_zero_2() -> None:
    config = PretrainConfig()
    assert (config.world_size, config.zero_stage, config.optimizer.name, config.accumulation) == (2, 2, "lamb", 1)


def test_accumulation_fills_the_batch() -> None:
    assert PretrainConfig(batch_size=48, micro_batch_size=4, world_size=3).accumulation == 4


def test_any_setting_of_lisa_switches_it_on_unless_its_switch_says_otherwise() -> None:
    assert PretrainConfig.model_validate({"lisa": {"layers": 2}}).lisa.enabled
    assert not PretrainConfig.model_validate({"lisa": {}}).lisa.enabled
    assert PretrainConfig.model_validate({"lisa": {"enabled": False, "layers": 50}}).lisa.layers == 50


def test_each_rule_has_a_rate_of_its_own_unless_one_is_given() -> None:
    rates = {name: OptimizerConfig(name=name).peak_lr for name in ("lamb", "adamw", "lars")}
    assert rates["adamw"] < rates["lamb"]  # one is relative to the weights, the other is not
    assert OptimizerConfig(name="adamw", lr=0.5, eps=0.25).peak_lr == 0.5
    assert OptimizerConfig(name="adamw", eps=0.25).epsilon == 0.25
    assert OptimizerConfig(name="adamw").epsilon != OptimizerConfig(name="lamb").epsilon


def test_the_tokenizer_completes_the_architecture() -> None:
    architecture = PretrainConfig.model_validate({"model": {"layers": 7}}).architecture(INDEX)
    assert (architecture.layers, architecture.vocab_size, architecture.max_positions) == (7, 512, 64)
    assert (architecture.bos_id, architecture.eos_id, architecture.pad_id, architecture.mask_id) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"steps": 401},
        {"world_size": 1},
        {"zero_stage": 3},
        {"optimizer": {"lr": 0.1}},
        {"lisa": {"enabled": True}},
        {"model": {"rope_theta": 500.0}},
        {"validate_every": 7},
        {"precision": "bf16"},
        {"compile": True},
        {"loss_chunk": 64},
        {"activation_checkpointing": "full"},
        {"optimizer": {"compiled": True}},
    ],
)
def test_a_value_that_changes_the_result_changes_the_identity(values: dict[str, Any]) -> None:
    assert fingerprint.digest(PretrainConfig.model_validate(values).identity()) != fingerprint.digest(
        PretrainConfig().identity()
    )


@pytest.mark.parametrize(
    "values", [{"log_every": 10}, {"checkpoint": {"every": 3, "keep": 5}}, {"profile": {"start": 3}}]
)
def test_a_value_that_only_shows_or_saves_does_not(values: dict[str, Any]) -> None:
    assert PretrainConfig.model_validate(values).identity() == PretrainConfig().identity()


def test_every_field_is_described() -> None:
    for model in (PretrainConfig, *(f.annotation for f in PretrainConfig.model_fields.values())):
        for name, field in getattr(model, "model_fields", {}).items():
            assert field.description, f"{model}.{name}"


def test_the_settings_are_read_without_torch() -> None:
    code = "import sys, pipelines.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("values", [{"compile": True}, {"loss_chunk": 64}, {"optimizer": {"compiled": True}}])
def test_a_run_may_go_on_with_another_kernel_of_the_same_arithmetic(values: dict[str, Any]) -> None:
    assert PretrainConfig.model_validate(values).resume_key() == PretrainConfig().resume_key()


def test_a_profile_behind_the_last_step_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"profile\.start = 398; of 400 steps, valid: 1 to 397"):
        PretrainConfig.model_validate({"profile": {"start": 398}})


def test_a_compiled_model_with_layers_that_compute_again_is_refused() -> None:
    with pytest.raises(ValidationError, match="the compiler decides itself what is computed again"):
        PretrainConfig.model_validate({"compile": True, "activation_checkpointing": "full"})


def test_a_compiled_model_with_lisa_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"compile = true with lisa\.enabled = true"):
        PretrainConfig.model_validate({"compile": True, "lisa": {"enabled": True}})
