"""One place chooses the device, and names what is not there."""

from __future__ import annotations

import pytest
import torch

from pipelines.core.compute import ComputeConfig, resolve_device, torch_device
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
