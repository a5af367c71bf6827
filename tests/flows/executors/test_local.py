"""The local executor: in this process, or children side by side that end as their stage ended."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from flows import executors
from pipelines.core import errors
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, IngotError, Preempted, TransientError
from pipelines.core.stage import Progress
from tests.pipelines.core.toy_stages import request


def ignore(_progress: Progress) -> None: ...


def children() -> list[list[str]]:
    """Return the stages at work below this process; servers of other tests may be there too."""
    commands = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    return [command for command in commands if "pipelines.core.run_stage" in command]


def test_executors_are_found_by_file_name() -> None:
    assert "local" in executors.names()
    with pytest.raises(ConfigError, match=r"compute\.executor is 'cloud'; there is kubernetes, local, slurm"):
        executors.get(ComputeConfig(executor="cloud"))


def test_one_at_a_time_runs_in_this_process_and_several_give_the_same_bytes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    here = executors.get(ComputeConfig()).execute(request(tmp_path / "a"), seen.append)
    there = executors.get(ComputeConfig(parallel=2)).execute(request(tmp_path / "b"), seen.append)
    assert here.digest == there.digest
    assert there.manifest.summary == {"letters": 5}
    assert seen == [Progress("toy.a", 1, 2, "letters", "half", {"loss": 0.5})] * 2
    assert children() == []


def test_two_requests_really_overlap(tmp_path: Path) -> None:
    """Each waits for a file of the other: one after the other, neither would end."""
    (tmp_path / "meet").mkdir()
    local = executors.get(ComputeConfig(parallel=2))
    asked = [request(tmp_path / "store", text=text, meet=str(tmp_path / "meet")) for text in ("a", "b")]
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda one: local.execute(one, ignore), asked))
    assert [(each.path / "out.txt").read_text() for each in made] == ["a", "b"]


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("kind", ["DiskFullError", "GateRefused", "TransientError", "LockedError"])
def test_an_error_is_the_same_wherever_the_stage_ran(tmp_path: Path, kind: str, parallel: int) -> None:
    with pytest.raises(IngotError, match="it failed") as caught:
        executors.get(ComputeConfig(parallel=parallel)).execute(request(tmp_path, fail=kind), ignore)
    assert type(caught.value) is getattr(errors, kind)
    assert caught.value.hint == "do this"


def test_a_killed_child_is_a_fault_that_may_pass(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"the process of toy\.a was killed by SIGKILL"):
        executors.get(ComputeConfig(parallel=2)).execute(request(tmp_path, fail="SIGKILL"), ignore)


def test_stop_has_children_save_and_refuses_what_is_asked_later(tmp_path: Path) -> None:
    local, at_work = executors.get(ComputeConfig(parallel=2)), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(local.execute, request(tmp_path, sleep=True), lambda _progress: at_work.set())
        assert at_work.wait(60)
        local.stop()
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            future.result(60)
    assert children() == []
    assert [path.read_text() for path in tmp_path.glob("scratch/*/progress")] == ["half way"]
    with pytest.raises(Preempted):
        local.execute(request(tmp_path), ignore)
