"""Bars of libraries are silent while a stage works, whatever they were told."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tqdm import tqdm
from tqdm.auto import trange

from pipelines.core import progress_bars


def test_no_bar_is_drawn_inside_and_bars_are_back_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars.bars():
        assert list(tqdm(range(3), desc="asked for", disable=False)) == [0, 1, 2]
        assert list(trange(3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm(range(3), desc="shown again")) == [0, 1, 2]
    assert "shown again" in capsys.readouterr().err


def test_bars_are_back_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError), progress_bars.bars():
        fail()
    list(tqdm(range(1), desc="shown again"))
    assert "shown again" in capsys.readouterr().err


LOAD = """
import sys
from contextlib import nullcontext
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.offload import dispatch_model
from pipelines.core import progress_bars
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
with progress_bars.bars() if sys.argv[1] == "quiet" else nullcontext():
    apply_quantization_config(model, QuantizationConfig(config_groups={"W8A8": ["Linear"]}))
    dispatch_model(model)
"""


@pytest.mark.parametrize("how", ["quiet", "loud"])
def test_compressed_tensors_is_silent_too(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bars name `disable` themselves, so TQDM_DISABLE alone does not reach them: "loud" shows that."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("Applying quantization config" in done.stderr) == (how == "loud")
    assert ("%|" in done.stderr) == (how == "loud")
