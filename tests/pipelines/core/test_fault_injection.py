"""Fault points: silent without a plan, and once in the life of a plan with one."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import fault_injection
from pipelines.core.fault_injection import InjectedFaultError, fault_point

IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); from pipelines.core.fault_injection import fault_point"
CHECKOUT = Path(__file__).resolve().parents[3]


class Numbers:
    """Anything with torch's `fill_`."""

    def __init__(self) -> None:
        self.values = [1.0, 2.0]

    def fill_(self, value: float) -> None:
        self.values = [value] * len(self.values)


@pytest.fixture(autouse=True)
def _fresh_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "_visits", fault_injection.Counter())
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a plan and switch it on."""
    path = tmp_path / "faults.json"

    def write(*entries: dict[str, Any]) -> Path:
        path.write_text(json.dumps(entries))
        monkeypatch.setenv(fault_injection.ENVIRONMENT_VARIABLE, str(path))
        return path

    return write


def test_without_a_plan_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fault_injection.ENVIRONMENT_VARIABLE, raising=False)
    started = time.perf_counter()
    for _ in range(10_000):
        fault_point("train.after_step", step=1)
    assert (time.perf_counter() - started) / 10_000 < 100e-6


def test_a_fault_waits_for_its_point_and_all_its_coordinates(plan: Any) -> None:
    plan({"point": "a.b", "rank": 1, "step": 7, "action": "raise"})
    fault_point("a.c", rank=1, step=7)
    fault_point("a.b", rank=0, step=7)
    fault_point("a.b", rank=1, step=6)
    fault_point("a.b", rank=1)  # no step here: it cannot be step 7
    with pytest.raises(InjectedFaultError, match=r"injected at a\.b"):
        fault_point("a.b", rank=1, step=7)


def test_the_rank_is_known_from_the_environment(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan({"point": "a.b", "rank": 3, "action": "raise"})
    fault_point("a.b")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InjectedFaultError):
        fault_point("a.b")


def test_nth_counts_matching_visits_only(plan: Any) -> None:
    plan({"point": "a.b", "step": 7, "nth": 3, "action": "raise"})
    for step in (7, 8, 7, 8):
        fault_point("a.b", step=step)
    with pytest.raises(InjectedFaultError):
        fault_point("a.b", step=7)


def test_a_fault_fires_once_even_after_a_restart(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plan({"point": "a.b", "action": "raise"})
    with pytest.raises(InjectedFaultError):
        fault_point("a.b")
    monkeypatch.setattr(fault_injection, "_visits", fault_injection.Counter())  # as in a new process
    fault_point("a.b")
    assert path.with_name("faults.json.0.fired").exists()


def test_two_faults_at_one_point_fire_one_visit_after_the_other(plan: Any) -> None:
    plan({"point": "a.b", "action": "raise"}, {"point": "a.b", "action": "raise"})
    for _ in range(2):
        with pytest.raises(InjectedFaultError):
            fault_point("a.b")
    fault_point("a.b")


def test_of_many_processes_exactly_one_gets_the_fault(plan: Any) -> None:
    path = plan({"point": "a.b", "action": "SIGKILL"})
    code = f"{IMPORT}; fault_point('a.b')"
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(CHECKOUT)], env={fault_injection.ENVIRONMENT_VARIABLE: str(path)}
        )
        for _ in range(6)
    ]
    assert sorted(process.wait(timeout=60) for process in crowd) == [-signal.SIGKILL, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_signals_hit_the_process_itself(plan: Any, name: str) -> None:
    path = plan({"point": "a.b", "action": name})
    code = f"{IMPORT}; fault_point('a.b')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(CHECKOUT)], env={fault_injection.ENVIRONMENT_VARIABLE: str(path)}, timeout=60
    )
    assert done.returncode == -signal.Signals[name]


def test_a_full_disk_looks_like_the_real_thing(plan: Any, tmp_path: Path) -> None:
    plan({"point": "a.b", "action": "ENOSPC"})
    with pytest.raises(OSError, match="No space left") as caught:
        fault_point("a.b", path=tmp_path / "x")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "x")


def test_truncate_takes_the_last_byte_and_flip_one_bit(plan: Any, tmp_path: Path) -> None:
    plan({"point": "cut", "action": "truncate"}, {"point": "flip", "action": "flip"})
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(range(9)))
    fault_point("cut", path=victim)
    assert victim.read_bytes() == bytes(range(8))
    fault_point("flip", path=victim)
    changed = [i for i, (old, new) in enumerate(zip(bytes(range(8)), victim.read_bytes(), strict=True)) if old != new]
    assert changed == [4]
    assert victim.read_bytes()[4] == 4 ^ 1


def test_nan_fills_the_tensor(plan: Any) -> None:
    plan({"point": "a.b", "action": "nan"})
    numbers = Numbers()
    fault_point("a.b", tensor=numbers)
    assert all(value != value for value in numbers.values)


@pytest.mark.parametrize(("given", "factor"), [({}, 100.0), ({"factor": -3.0}, -3.0)])
def test_scale_multiplies_the_tensor(plan: Any, given: dict[str, Any], factor: float) -> None:
    import torch

    tensor = torch.tensor([1.0, -2.0])
    plan({"point": "here", "action": "scale", **given})
    fault_point("here", tensor=tensor)
    assert tensor.tolist() == [factor, -2 * factor]


def test_delay_takes_the_time_it_says(plan: Any) -> None:
    plan({"point": "a.b", "action": "delay", "seconds": 0.2})
    started = time.monotonic()
    fault_point("a.b")
    assert time.monotonic() - started >= 0.2


def test_an_unknown_action_is_refused_at_once(plan: Any) -> None:
    plan({"point": "elsewhere", "action": "explode"})
    with pytest.raises(ValueError, match="unknown action 'explode'; known: SIGKILL"):
        fault_point("a.b")
