"""What a pretraining is said to take: arithmetic, time by its source, disk, and settings that would take less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import recipe
from models.architectures.config import count_parameters, flops_per_token
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.estimate import Estimate, EstimateContext, refuse_what_does_not_fit
from pipelines.core.machine import Machine
from pipelines.training import estimate, room
from pipelines.training.config import PretrainConfig
from pipelines.training.estimate import architecture_of, estimate_pretrain

PREPARED = Estimate(facts={"vocab_size": 4096, "sequence_length": 256})
LAPTOP = Machine("cpu", 16 * 10**9, "this machine has", shared=True, cores=4)
GPU = Machine("cuda", 80 * 10**9, "the GPU has", host_bytes=500 * 10**9, gpu="NVIDIA H100 80GB HBM3")


def config(**changes: Any) -> PretrainConfig:
    """The settings of a demo."""
    values = {"world_size": 2, "batch_size": 8, "micro_batch_size": 2, "steps": 100, "schedule": {"warmup": 1}}
    return PretrainConfig.model_validate({**values, **changes})


def estimated(settings: PretrainConfig, machine: Machine = LAPTOP, history: tuple[Artifact, ...] = ()) -> Estimate:
    """The estimate on a machine."""
    return estimate_pretrain(settings, EstimateContext(machine, {"prepare": PREPARED}, history=history))


def trained(folder: Path, settings: PretrainConfig, *, step_s: float, peak_flops: float = 50e9) -> Artifact:
    """An artifact as a pretraining leaves it, whose steps took so long."""
    build = folder / "build"
    (build / "model").mkdir(parents=True)
    busy = {"data": 0.0, "forward": 0.3, "backward": 0.5, "step": 0.2}
    observed = {
        "seconds": {part: share * step_s * settings.steps for part, share in busy.items()} | {"validate": 3.0},
        "peak_flops_per_rank": peak_flops,
        "device": "cpu",
        "threads_per_rank": settings.threads,
    }
    (build / "observations.json").write_text(json.dumps(observed))
    (build / "model" / "config.json").write_text(json.dumps({"vocab_size": 4096, "max_position_embeddings": 256}))
    identity = {"stage": "pretrain", "version": 3, "config": settings.identity(), "inputs": {}}
    return artifact.publish(
        build, folder / "final", stage="pretrain", node="pretrain", identity=identity, parents={}, summary={}
    )


def busy_s(found: Estimate, settings: PretrainConfig) -> float:
    """Seconds without what does not grow with the steps."""
    assert found.time is not None
    return found.time.seconds - estimate._start_and_files(settings, architecture_of(settings, 4096, 256))


def test_arithmetic_is_that_of_all_tokens_of_all_phases() -> None:
    phases = [
        {"steps": 30, "batch_size": 16, "sequence_length": 64},
        {"steps": 10, "batch_size": 8, "batch_warmup": {"start": 4, "steps": 4}},
    ]
    settings = config(phases=phases, batch_size=16, steps=40)
    model = architecture_of(settings, 4096, 256)
    long = (4 * 4 + 6 * 8) * 256
    found = estimated(settings)
    assert found.facts["tokens"] == 30 * 16 * 64 + long
    assert found.flops == pytest.approx(30 * 16 * 64 * flops_per_token(model, 64) + long * flops_per_token(model, 256))


def test_disk_is_what_a_training_is_refused_without() -> None:
    settings = config(checkpoint={"keep": 4})
    found = estimated(settings)
    needed = room.needed_bytes(settings, architecture_of(settings, 4096, 256))
    assert found.disk["checkpoints"] + found.disk["model"] == needed


def test_without_history_the_time_is_stated_and_says_what_was_assumed() -> None:
    time = estimated(config()).time
    assert time is not None
    assert time.source == "stated"
    assert "GFLOP/s a rank, assumed" in time.basis
    on_gpu = estimated(config(precision="bf16"), GPU).time
    assert on_gpu is not None
    assert "989 TFLOP/s a rank, data sheet of the H100" in on_gpu.basis


def test_an_earlier_run_of_the_same_shape_is_told_as_measured_whatever_else_differs(tmp_path: Path) -> None:
    before = config()
    earlier = trained(tmp_path, before, step_s=0.7)
    again = config(steps=300, seed=9, optimizer={"lr": 0.004}, validate_every=1000)
    found = estimated(again, history=(earlier,))
    assert found.time is not None
    assert found.time.source == "measured"
    assert busy_s(found, again) == pytest.approx(300 * 0.7, rel=0.05)


def test_an_earlier_run_of_another_shape_is_scaled_by_the_work_of_the_two(tmp_path: Path) -> None:
    earlier = trained(tmp_path, config(), step_s=0.7)
    larger = config(preset="30m", micro_batch_size=4)
    found = estimated(larger, history=(earlier,))
    assert found.time is not None
    assert found.time.source == "scaled"
    assert earlier.manifest.fingerprint[:8] in found.time.basis
    ratio = (found.flops or 0.0) / (estimated(config()).flops or 1.0)
    assert 0.5 * ratio < busy_s(found, larger) / (100 * 0.7) < 1.2 * ratio


def test_a_run_in_other_arithmetic_tells_nothing_of_this_one(tmp_path: Path) -> None:
    earlier = trained(tmp_path, config(), step_s=0.7)
    found = estimated(config(precision="bf16"), history=(earlier,))
    assert found.time is not None
    assert found.time.source == "stated"


def test_a_stated_peak_stands_before_history(tmp_path: Path) -> None:
    earlier = trained(tmp_path, config(), step_s=0.7)
    fast, slow = (
        estimated(config(), Machine("cpu", None, peak_flops=peak), history=(earlier,)).time for peak in (1e15, 1e10)
    )
    assert fast is not None
    assert slow is not None
    assert (fast.source, fast.basis) == ("stated", "compute.peak_tflops")
    assert fast.seconds < slow.seconds


@pytest.mark.parametrize(
    "slower",
    [{"steps": 200}, {"batch_size": 16}, {"preset": "10m"}, {"optimizer": {"name": "lamb"}, "batch_size": 12}],
    ids=str,
)
def test_more_work_takes_longer(slower: dict[str, Any]) -> None:
    times = [estimated(each).time for each in (config(), config(**slower))]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1].seconds > times[0].seconds


def test_more_ranks_than_cores_do_not_make_it_faster() -> None:
    few = Machine("cpu", None, cores=2)
    times = [estimated(config(world_size=ranks, batch_size=16), few).time for ranks in (2, 8)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1].seconds > 0.95 * times[0].seconds


def test_seven_billion_parameters_are_refused_on_a_laptop_with_settings_that_fit() -> None:
    found = estimated(config(preset="7b"))
    with pytest.raises(
        ConfigError, match=r"pretrain cannot fit: 2 ranks of \d+ GB are needed .*this machine has 16 GB"
    ) as caught:
        refuse_what_does_not_fit("pretrain", found, LAPTOP)
    assert "pretrain.preset=90m" in str(caught.value)
    for remedy in [each for each in found.remedies if "pretrain.preset=90m" in each.settings]:
        assert remedy.needs.ranks * remedy.needs.rank_bytes + remedy.needs.first_bytes <= 16e9


def test_settings_that_are_offered_hold_what_is_said_of_them() -> None:
    model = {"ffn_width": 8000}  # it stays when another preset is chosen
    settings = config(preset="3b", model=model, precision="bf16", zero_stage=1, micro_batch_size=4)
    found = estimated(settings, Machine("cuda", 24 * 10**9))
    assert found.remedies
    for remedy in found.remedies:
        table = {"pretrain": settings.model_dump(exclude_unset=True)}
        for setting in remedy.settings:
            recipe.apply(table, setting)
        changed = PretrainConfig.model_validate(table["pretrain"])
        assert estimated(changed, GPU).needs == remedy.needs, remedy.settings


def test_over_more_gpus_a_model_fits_that_one_cannot_hold() -> None:
    small = Machine("cuda", 24 * 10**9, "compute.memory is")
    found = estimated(config(preset="7b", precision="bf16"), small)
    with pytest.raises(
        ConfigError,
        match=r"pretrain.world_size=\d+ .*pretrain.zero_stage=3|pretrain.zero_stage=3 .*pretrain.world_size=\d+",
    ):
        refuse_what_does_not_fit("pretrain", found, small)


def test_what_fits_is_not_refused_and_needs_no_remedy() -> None:
    found = estimated(config())
    refuse_what_does_not_fit("pretrain", found, LAPTOP)
    assert not found.remedies


def test_nothing_is_refused_on_a_machine_of_which_nothing_is_known() -> None:
    refuse_what_does_not_fit("pretrain", estimated(config(preset="7b"), Machine("cuda", None)), Machine("cuda", None))


def test_the_facts_for_the_stages_below_are_of_this_model() -> None:
    found = estimated(config(preset="10m"))
    model = architecture_of(config(preset="10m"), 4096, 256)
    assert found.facts["parameters"] == count_parameters(model)
    assert found.facts["forward_flops_per_token"] == pytest.approx(flops_per_token(model, 256) / 3)


def test_a_phase_that_does_not_fit_the_sequences_is_refused_when_planning() -> None:
    with pytest.raises(ConfigError, match=r"does not divide prepare.sequence_length"):
        estimated(config(phases=[{"steps": 100, "batch_size": 8, "sequence_length": 100}]))
