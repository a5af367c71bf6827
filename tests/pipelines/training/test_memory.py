"""The memory of a rank: its arithmetic, what autograd really keeps, and DeepSpeed's own estimators beside it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from models.architectures import predict
from models.architectures.build import build
from models.architectures.config import IGNORED, ArchitectureConfig, count_parameters
from models.architectures.recompute import checkpoint_activations
from pipelines.training import memory
from pipelines.training.config import PretrainConfig
from pipelines.training.estimate import architecture_of

GIGA = 10**9


def config(**changes: Any) -> PretrainConfig:
    """A training on 8 ranks in float32."""
    values = {"world_size": 8, "batch_size": 128, "micro_batch_size": 2, "preset": "30m", "schedule": {"warmup": 1}}
    return PretrainConfig.model_validate({**values, **changes})


def model(settings: PretrainConfig, vocab_size: int = 32_000, length: int = 512) -> ArchitectureConfig:
    """Its architecture."""
    return architecture_of(settings, vocab_size, length)


def states(*, offloaded: bool = False, **changes: Any) -> dict[str, int]:
    """State of a rank, on the device or offloaded, under changed settings."""
    settings = config(**changes)
    return memory.state_bytes(settings, model(settings))[1 if offloaded else 0]


@pytest.mark.parametrize(("stage", "moments_of"), [(0, 1), (1, 8), (2, 8), (3, 8)])
def test_zero_cuts_masters_and_moments_into_equal_parts_from_stage_1_on(stage: int, moments_of: int) -> None:
    settings = config(zero_stage=stage)
    every = count_parameters(model(settings))
    held = states(zero_stage=stage)
    assert held["optimizer state"] == pytest.approx(8 * every / moments_of, abs=8)
    assert held.get("master weights", 0) == (0 if stage == 0 else pytest.approx(4 * every / 8, abs=4))


def test_a_stage_that_shards_more_never_holds_more_of_a_model_beyond_the_buffers() -> None:
    held = [sum(states(preset="7b", zero_stage=stage).values()) for stage in (0, 1, 2, 3)]
    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize(
    "leaner",
    [
        {"world_size": 16},
        {"optimizer": {"name": "lars"}},
        {"lisa": {"layers": 1}},
        {"preset": "10m"},
        {"micro_batch_size": 1},
        {"loss_chunk": 16},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_what_should_take_less_takes_less(leaner: dict[str, Any]) -> None:
    more, less = config(), config(**leaner)
    bytes_of = [memory.of_rank(each, model(each), "cpu").device_bytes for each in (more, less)]
    assert bytes_of[1] < bytes_of[0]


def test_the_first_rank_gathers_all_weights_at_the_end_whatever_its_share_of_the_rest_is() -> None:
    few, many = (
        memory.of_rank(each, model(each), "cpu") for each in (config(world_size=1), config(preset="7b", world_size=32))
    )
    assert few.first_bytes == 0  # the checkpoint that it copied while training was larger
    passes = {name: many.device[name] for name in ("activations", "logits", "checkpoint being written")}
    assert many.first_bytes == 4 * count_parameters(model(config(preset="7b"))) - sum(passes.values()) > 0
    assert many.most_bytes == many.device_bytes + many.first_bytes


def test_longer_sequences_and_larger_vocabularies_take_more() -> None:
    settings = config()
    of = [
        memory.of_rank(settings, model(settings, *size), "cpu").device_bytes
        for size in ((4096, 64), (4096, 512), (32_000, 512))
    ]
    assert of == sorted(of)
    assert of[0] < of[1] < of[2]


def test_offload_moves_masters_and_moments_to_the_host_of_a_gpu_and_only_adds_copies_on_a_cpu() -> None:
    here, moved = config(), config(offload=True)
    with_gpu = [memory.of_rank(each, model(each), "cuda") for each in (here, moved)]
    gone = {"master weights", "optimizer state"}
    assert gone <= set(with_gpu[0].device)
    assert not gone & set(with_gpu[1].device)
    assert {name: with_gpu[1].host[name] for name in gone} == {name: with_gpu[0].device[name] for name in gone}
    on_cpu = [memory.of_rank(each, model(each), "cpu").device_bytes for each in (here, moved)]
    largest_tensor, part = 32_000 * 512, count_parameters(model(here)) // 8
    assert on_cpu[1] - on_cpu[0] == pytest.approx(4 * (2 * largest_tensor + part), abs=8)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_zero_2_in_bf16_is_what_deepspeeds_own_estimator_says_but_for_its_buffers(ranks: int) -> None:
    """Theirs counts 16-bit gradients beside 32-bit ones in the part of a rank; ours counts the buffer they lie in."""
    settings = config(preset="7b", precision="bf16", zero_stage=2, world_size=ranks)
    every = count_parameters(model(settings))
    _, theirs = estimate_zero2_model_states_mem_needs(every, num_gpus_per_node=ranks, cpu_offload=False)
    held, _ = memory.state_bytes(settings, model(settings))
    assert sum(held.values()) - held["buffers"] == pytest.approx(theirs - 2 * every / ranks, rel=1e-6)


@pytest.mark.parametrize("ranks", [8, 64])
def test_zero_3_in_bf16_holds_what_deepspeeds_own_estimator_says_and_the_weights_it_keeps_gathered(ranks: int) -> None:
    settings = config(preset="7b", precision="bf16", zero_stage=3, world_size=ranks)
    architecture = model(settings)
    every, largest = count_parameters(architecture), memory.largest_layer(architecture)
    _, theirs, gathered = estimate_zero3_model_states_mem_needs(
        every, largest, num_gpus_per_node=ranks, cpu_offload=False, cpu_offload_params=False
    )
    held, _ = memory.state_bytes(settings, architecture)
    cut = sum(held.values()) - held["buffers"] - 2 * memory.BF16 * GIGA
    assert cut == pytest.approx(theirs - gathered, rel=1e-6)


def test_deepspeed_keeps_as_many_gathered_weights_as_is_counted_on() -> None:
    assert DeepSpeedZeroConfig(stage=3).max_live_parameters == GIGA


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("changes", [{}, {"width": 48, "heads": 6, "ffn_width": 80, "layers": 5}], ids=str)
def test_activations_are_what_autograd_keeps(family: str, changes: dict[str, Any]) -> None:
    settings = config(family=family, preset="0.5m", model=changes)
    architecture = model(settings, vocab_size=64, length=96)
    built = build(architecture, seed=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens_BT = torch.arange(2 * 96).reshape(2, 96) % 64
    targets_BT = torch.full_like(tokens_BT, IGNORED)
    targets_BT[0, 0] = 5
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        predict.language_nats(built, tokens_BT, targets_BT)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert memory.activation_bytes(settings, architecture, 2, 96) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_each_layer_keeps_as_much_as_is_counted_on_where_the_rest_is_computed_again(family: str, kind: str) -> None:
    """Twelve layers beside four: what the difference keeps after a forward pass, by what torch allocated."""
    (small, counted_small), (large, counted_large) = (held_and_counted(family, kind, layers) for layers in (4, 12))
    assert counted_large - counted_small == pytest.approx(large - small, rel=0.02)


def held_and_counted(family: str, kind: str, layers: int) -> tuple[int, int]:
    """What a model holds after a forward pass beyond torch's random state, which each layer keeps; what is counted."""
    settings = config(family=family, preset="0.5m", activation_checkpointing=kind, model={"layers": layers})
    architecture = model(settings, vocab_size=64, length=96)
    built = build(architecture, seed=0)
    checkpoint_activations(built, settings.activation_checkpointing)
    tokens_BT = torch.arange(2 * 96).reshape(2, 96) % 64
    predict.language_nats(built, tokens_BT, tokens_BT)  # what is allocated once is not counted
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        nats = predict.language_nats(built, tokens_BT, tokens_BT)
    held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    assert nats.requires_grad  # it holds the graph until here
    random_state = torch.get_rng_state().nbytes
    return held - layers * random_state, memory.activation_bytes(settings, architecture, 2, 96)


def test_only_the_targets_of_an_objective_have_logits() -> None:
    decoder, encoder = config(), config(family="encoder", objective_settings={"probability": 0.2})
    logits = [memory.pass_bytes(each, model(each), 2, 512)["logits"] for each in (decoder, encoder)]
    assert logits[1] == pytest.approx(0.2 * logits[0])
    chunked = config(loss_chunk=64)
    assert memory.pass_bytes(chunked, model(chunked), 2, 512)["logits"] == 3 * 4 * 64 * 32_000
