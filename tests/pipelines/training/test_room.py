"""Room for checkpoints: the forecast is what a training really writes, and a full disk stops it, before or during."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines.core import disk as disk_space
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import DiskFullError
from pipelines.core.stage import StageContext
from pipelines.training import room, stage
from pipelines.training.config import PretrainConfig

Run = Callable[..., int]
MakeSpec = Callable[..., Any]
KIB = 1024


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"name": "lars", "lr": 0.01}},
        {"family": "encoder"},
        {"lisa": {"enabled": True, "layers": 1, "interval": 2}},
    ],
    ids=["lamb", "lars", "encoder", "lisa"],
)
def test_the_forecast_is_the_size_of_the_checkpoints_that_are_written(
    changes: dict[str, Any], run_plain: Run, plain_spec: MakeSpec, tmp_path: Path
) -> None:
    """File headers come on top; here, with tensors of a few KiB, they are the larger part of 4 %."""
    assert run_plain(tmp_path, steps=2, schedule={"warmup": 0}, **changes) == 0
    (written,) = (tmp_path / "checkpoints").glob("step-*/*.safetensors")
    spec = plain_spec(tmp_path, **changes)
    forecast = room.checkpoint_bytes(spec.config, spec.config.architecture(spec.index))
    held = sum(tensor.numel() * tensor.element_size() for tensor in load_file(written).values())
    assert forecast == pytest.approx(held, rel=0.002)
    assert held <= written.stat().st_size < 1.04 * held


def test_more_checkpoints_that_are_kept_need_more_room(plain_spec: MakeSpec, tmp_path: Path) -> None:
    def needed(**changes: Any) -> int:
        spec = plain_spec(tmp_path, **changes)
        return room.needed_bytes(spec.config, spec.config.architecture(spec.index))

    one = needed(checkpoint={"keep": 3}) - needed(checkpoint={"keep": 2})
    spec = plain_spec(tmp_path)
    assert one == room.checkpoint_bytes(spec.config, spec.config.architecture(spec.index))


def test_a_training_without_room_is_refused_before_it_starts(
    disk_of: Callable[[int], Any], prepared: Artifact, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    disk = disk_of(1500)
    config = PretrainConfig.model_validate({**tiny_settings, "checkpoint": {"keep": 9}})
    context = StageContext("pretrain", disk.path / "scratch", compute=ComputeConfig(device="cpu"))
    with pytest.raises(DiskFullError, match="9 are kept and one more is written") as caught:
        stage.run(config, {"prepare": prepared}, tmp_path / "out", context)
    needed, free = map(int, re.findall(r"(\d+) (?:bytes are needed in all|are free)", str(caught.value)))
    assert needed > 1500 * KIB >= free > 1400 * KIB
    assert not (disk.path / "scratch" / "checkpoints").exists()


def test_checkpoints_of_an_earlier_attempt_count_as_room(disk_of: Callable[[int], Any], plain_spec: MakeSpec) -> None:
    disk = disk_of(2048)
    spec = plain_spec(disk.path / "scratch")
    needed = room.needed_bytes(spec.config, spec.config.architecture(spec.index))
    held = disk.path / "scratch" / "checkpoints" / "step-00000002"
    held.mkdir(parents=True)
    (held / "rank-00000.safetensors").write_bytes(b"\0" * (disk_space.free(disk.path) - needed + 64 * KIB))
    room.check(spec)
    (held / "rank-00000.safetensors").rename(disk.path / "of-others")
    with pytest.raises(DiskFullError):
        room.check(spec)


def test_a_disk_that_fills_while_training_stops_it_and_it_goes_on_to_the_same_bytes(
    disk_of: Callable[[int], Any], run_plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints that do not fit, then a model that does not: exit 4 each time, and no step is lost or done twice."""
    assert run_plain(tmp_path / "undisturbed") == 0
    checkpoint = disk_space.size_of(next((tmp_path / "undisturbed" / "checkpoints").glob("step-*")))
    disk = disk_of(checkpoint * 3 // 2 // KIB)
    work = disk.path / "work"
    assert run_plain(work) == DiskFullError.exit_code
    assert "no space for the checkpoint of step" in capsys.readouterr().err
    disk.resize((checkpoint * 2 + 40 * KIB) // KIB)
    assert run_plain(work) == DiskFullError.exit_code
    assert "no space for what the training writes" in capsys.readouterr().err
    assert not (work / "training.json").exists()
    disk.resize(8 * checkpoint // KIB)
    assert run_plain(work) == 0
    for name in ("model/model.safetensors", "training.json"):
        assert (work / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
