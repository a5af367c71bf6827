"""Loss curves to the last bit.

After a change that is meant to change them, record them anew and say so in the commit:

    python -m pytest tests/golden --write-golden

On another processor or torch the last bits may differ: then the curve must agree to 1e-5.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LOSSES = Path(__file__).with_name("losses.json")
CASES: dict[str, dict[str, Any]] = {
    "decoder-lamb": {},
    "decoder-adamw-lisa": {"optimizer": {"name": "adamw"}, "lisa": {"enabled": True, "layers": 1, "interval": 4}},
    "encoder-lamb": {"family": "encoder"},
    "decoder-lars": {"optimizer": {"name": "lars"}},
}
STEPS = {"steps": 20, "validate_every": 10, "checkpoint": {"every": 20}}


def machine() -> str:
    """What the last bits may depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_the_recorded_one(
    case: str, run_plain: Callable[..., int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert run_plain(tmp_path, **STEPS, **CASES[case]) == 0
    facts = json.loads((tmp_path / "training.json").read_text())
    found = {"losses": facts["losses"], "validations": [v["loss"] for v in facts["validations"]]}
    recorded = json.loads(LOSSES.read_text()) if LOSSES.exists() else {"curves": {}}
    if request.config.getoption("--write-golden"):
        curves = {**recorded["curves"], case: found}
        LOSSES.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")
        return
    expected = recorded["curves"][case]
    if machine() == recorded["machine"]:
        assert found == expected
    for key, values in expected.items():
        assert [float.fromhex(v) for v in found[key]] == pytest.approx([float.fromhex(v) for v in values], rel=1e-5)


def test_the_recorded_curves_fall() -> None:
    for case, curve in json.loads(LOSSES.read_text())["curves"].items():
        losses = [float.fromhex(loss) for loss in curve["losses"]]
        assert len(losses) == STEPS["steps"]
        assert sum(losses[-5:]) < sum(losses[:5]), case
