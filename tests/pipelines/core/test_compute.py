"""One place chooses the device, and names what is not there."""

from __future__ import annotations

import pytest
import torch

from pipelines.core.compute import ComputeConfig, resolve_device, seconds_of, torch_device
from pipelines.core.errors import ConfigError


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks", "device"),
    [("cpu", 8, 2, "cpu"), ("auto", 0, 2, "cpu"), ("auto", 2, 2, "cuda"), ("cuda", 1, 1, "cuda")],
)
def test_the_device_follows_the_wish_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, ranks: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device(wanted, ranks=ranks) == device
    assert torch_device(ComputeConfig.model_validate({"device": wanted})).type == device


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks", "said"),
    [("cuda", 0, 1, "cuda: 0 GPUs for 1 rank"), ("auto", 1, 2, "auto: 1 GPUs for 2 ranks")],
)
def test_too_few_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, ranks: int, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=said):
        resolve_device(wanted, ranks=ranks)


def test_a_stage_sees_its_own_resources_in_place_of_the_common_ones() -> None:
    table = {"nodes": 2, "time": "4h", "device": "cuda", "stages": {"pretrain": {"nodes": 4, "partition": "gpu"}}}
    compute = ComputeConfig.model_validate(table)
    training, other = compute.at("pretrain", ranks=8, cores=16), compute.at("evaluate", ranks=1, cores=1)
    assert (training.nodes, training.time, training.partition) == (4, "4h", "gpu")
    assert (training.cpus, training.gpus_per_node) == (4, 2)
    assert (other.nodes, other.time, other.partition, other.cpus, other.gpus_per_node) == (1, "4h", None, None, 1)
    assert training.stages == other.stages == {}


@pytest.mark.parametrize(("time", "seconds"), [("90m", 5400), ("4h", 14400), ("1d12h", 129600), ("", 0), ("4", 0)])
def test_times_are_days_hours_and_minutes(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
