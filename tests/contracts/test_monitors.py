"""What every monitor keeps to, whichever it is: the registry finds it, and this file asks the same of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.training import monitors
from pipelines.training.config import PretrainConfig
from pipelines.training.monitors import registry
from pipelines.training.monitors.base import Monitor

CALM = [4.0 + 0.01 * math.sin(step) for step in range(200)]


def settings(name: str) -> dict[str, Any]:
    """Return what a monitor must be told: the example value of every setting without a default."""
    required = {key: field for key, field in registry.get(name).Config.model_fields.items() if field.is_required()}
    silent = [key for key, field in required.items() if not field.examples]
    assert not silent, f"{name}: {silent} have neither a default nor a value in Field(examples=[...])"
    return {key: (field.examples or [])[0] for key, field in required.items()}


def make(name: str) -> Monitor:
    return registry.make({name: settings(name)})[name]


@pytest.mark.parametrize("name", registry.names())
def test_a_calm_run_is_left_alone(name: str) -> None:
    monitor = make(name)
    assert [loss for loss in CALM if monitor.refuses(loss) is not None] == []


@pytest.mark.parametrize("name", registry.names())
def test_it_goes_on_from_its_state_as_if_nothing_had_happened(name: str) -> None:
    """The state is JSON, and a monitor that is given it decides as the one that never stopped."""
    whole, first = make(name), make(name)
    for loss in CALM[:60]:
        whole.refuses(loss)
        first.refuses(loss)
    second = make(name)
    second.load(json.loads(json.dumps(first.state())))
    rest = [*CALM[60:90], 400.0, *CALM[90:120]]
    assert [second.refuses(loss) for loss in rest] == [whole.refuses(loss) for loss in rest]
    assert second.state() == whole.state()


@pytest.mark.parametrize("name", registry.names())
def test_every_setting_is_described(name: str) -> None:
    assert all(field.description for field in registry.get(name).Config.model_fields.values())


@pytest.mark.parametrize("name", registry.names())
def test_the_recipe_switches_it_on_by_its_key(name: str) -> None:
    assert PretrainConfig.model_validate({"monitors": {name: settings(name)}}).monitors
    with pytest.raises(ValueError, match="no monitor 'loss_spike'; did you mean 'loss_spikes'"):
        PretrainConfig.model_validate({"monitors": {"loss_spike": {}}})


def test_one_file_is_a_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plateau_toy.py").write_text(
        "from pipelines.training.monitors import base\n"
        "class Monitor(base.Monitor):\n"
        "    def refuses(self, loss):\n"
        "        return None\n"
        "    def state(self):\n"
        "        return {}\n"
        "    def load(self, state):\n"
        "        pass\n"
    )
    monkeypatch.setattr(monitors, "__path__", [*monitors.__path__, str(tmp_path)])
    assert "plateau_toy" in registry.names()
    assert make("plateau_toy").refuses(1.0) is None
