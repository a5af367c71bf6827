"""The executor `slurm` against real servers: jobs end as their stage ended, outlive their run, and go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows import executors
from pipelines.core import errors
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, IngotError, Preempted, TransientError
from pipelines.core.stage import Progress
from tests.cluster.slurm_servers import Slurm, wait_for
from tests.pipelines.core.toy_stages import request

CHECKOUT = Path(__file__).resolve().parents[2]
SLURM = ComputeConfig(executor="slurm", parallel=4, grace_s=5.0)


def ignore(_progress: Progress) -> None: ...


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A run of one toy in a process of its own, as a flow is one."""
    code = f"""
import sys
from pathlib import Path
from flows import executors
from pipelines.core.compute import ComputeConfig
from tests.pipelines.core.toy_stages import request
compute = ComputeConfig(executor="slurm", grace_s=5.0)
executors.get(compute).execute(request(Path({str(folder / "store")!r}), compute=compute, {", ".join(options)}), print)
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.DEVNULL, text=True)


def test_a_job_gives_the_same_bytes_and_leaves_no_folder(slurm: Slurm, tmp_path: Path) -> None:
    seen: list[Progress] = []
    here = executors.get(ComputeConfig()).execute(request(tmp_path / "a"), ignore)
    there = executors.get(SLURM).execute(request(tmp_path / "b", compute=SLURM), seen.append)
    assert there.digest == here.digest
    assert Progress("toy.a", 1, 2, "letters", "half", {"loss": 0.5}) in seen
    assert list((tmp_path / "b" / "jobs").iterdir()) == []


@pytest.mark.parametrize("kind", ["DiskFullError", "GateRefused", "TransientError", "SIGKILL"])
def test_an_error_is_the_same_as_here(slurm: Slurm, tmp_path: Path, kind: str) -> None:
    with pytest.raises(IngotError, match=r"it failed|killed by SIGKILL[\s\S]*what a library prints") as caught:
        executors.get(SLURM).execute(request(tmp_path, fail=kind, compute=SLURM), ignore)
    assert type(caught.value) is (TransientError if kind == "SIGKILL" else getattr(errors, kind))
    assert (caught.value.hint == "do this") == (kind != "SIGKILL")


def test_two_jobs_really_overlap(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()
    executor = executors.get(SLURM)
    asked = [request(tmp_path / "s", text=t, meet=str(tmp_path / "meet"), compute=SLURM) for t in ("a", "b")]
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda one: executor.execute(one, ignore), asked))
    assert [(each.path / "out.txt").read_text() for each in made] == ["a", "b"]


def test_stop_has_jobs_save_and_leaves_nothing(slurm: Slurm, tmp_path: Path) -> None:
    executor, at_work = executors.get(SLURM), threading.Event()

    def report(progress: Progress) -> None:
        if progress.done:
            at_work.set()

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, request(tmp_path, sleep=True, compute=SLURM), report)
        assert at_work.wait(60)
        executor.stop()
        assert slurm.active() == []
        with pytest.raises(Preempted):
            future.result(60)
    assert [path.read_text() for path in tmp_path.glob("scratch/*/progress")] == ["half way"]
    with pytest.raises(Preempted):
        executor.execute(request(tmp_path, compute=SLURM), ignore)


def test_the_job_of_a_run_that_was_killed_is_adopted(slurm: Slurm, tmp_path: Path) -> None:
    meet = tmp_path / "meet"
    meet.mkdir()
    before = len(slurm.jobs())
    first = started(tmp_path, f"meet={str(meet)!r}")
    wait_for((meet / "hello").exists, "the stage to work")
    first.send_signal(signal.SIGKILL)
    first.wait()
    asked = request(tmp_path / "store", meet=str(meet), compute=SLURM)
    executor = executors.get(SLURM)
    adopted = executor.adopt(asked)
    assert adopted is not None
    assert [adopted.id] == slurm.active()
    (meet / "second").touch()
    assert executor.execute(asked, ignore).manifest.summary == {"letters": 5}
    assert len(slurm.jobs()) == before + 1
    wait_for(lambda: not slurm.active(), "the job to end")
    assert executor.adopt(asked) is None


@pytest.mark.parametrize("runs_again", [False, pytest.param(True, marks=pytest.mark.cluster_full)])
def test_before_its_time_is_over_a_job_saves_and_is_queued_again(
    slurm: Slurm, tmp_path: Path, runs_again: bool
) -> None:
    """USR1 is what `--signal` sends; the clock of Slurm counts minutes. It starts such a job after two minutes."""
    meet = tmp_path / "meet"
    meet.mkdir()
    executor = executors.get(SLURM)
    asked = request(tmp_path / "store", meet=str(meet), compute=SLURM)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, asked, ignore)
        wait_for((meet / "hello").exists, "the stage to work")
        (job,) = slurm.active()
        (meet / "hello").unlink()
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
        queued = ("squeue", "--noheader", "--states=PENDING", "--format=%i")
        wait_for(lambda: slurm.ask(*queued).split() == [job], "the job to be queued again")
        assert "Restarts=1" in slurm.ask("scontrol", "show", "job", job)
        assert [path.read_text() for path in tmp_path.glob("store/scratch/*/progress")] == ["half way"]
        if runs_again:
            wait_for((meet / "hello").exists, "the stage to work again", 200)
            (meet / "second").touch()
            assert future.result(60).manifest.summary == {"letters": 5}
        else:
            executor.stop()
            with pytest.raises(Preempted):
                future.result(60)


@pytest.mark.cluster_full
def test_the_clock_of_slurm_has_a_job_save_before_its_time_is_over(slurm: Slurm, tmp_path: Path) -> None:
    """A job of one minute that asked to be told 35 s before: Slurm's own clock counts by half minutes or so."""
    compute = SLURM.model_copy(update={"time": "1m"})
    executor = executors.get(compute)
    asked = request(tmp_path / "store", sleep=True, compute=compute)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, asked, ignore)
        wait_for(lambda: len(slurm.active()) == 1, "the job to be submitted")
        (job,) = slurm.active()
        wait_for(lambda: "Restarts=1" in slurm.ask("scontrol", "show", "job", job), "the job to be queued again", 180)
        assert [path.read_text() for path in tmp_path.glob("store/scratch/*/progress")] == ["half way"]
        (log,) = tmp_path.glob("store/jobs/*/log")
        assert "DUE TO TIME LIMIT" not in log.read_text()
        executor.stop()
        with pytest.raises(Preempted):
            future.result(60)


def test_a_job_that_somebody_cancelled_ends_its_run_as_stopped(slurm: Slurm, tmp_path: Path) -> None:
    executor = executors.get(SLURM)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, request(tmp_path, sleep=True, compute=SLURM), ignore)
        wait_for(lambda: list(tmp_path.glob("scratch/*/progress")) != [], "the stage to work")
        slurm.ask("scancel", *slurm.active())
        with pytest.raises(Preempted):
            future.result(60)


def test_what_slurm_would_refuse_is_known_beforehand(slurm: Slurm, tmp_path: Path) -> None:
    executor = executors.get(SLURM)
    good = request(tmp_path, compute=SLURM)
    bad = request(tmp_path, compute=SLURM.model_copy(update={"partition": "nowhere"}))
    (problem,) = executor.problems([good, bad, bad])
    assert problem.startswith("toy.a: Slurm refuses: invalid partition specified: nowhere")
    with pytest.raises(ConfigError, match="invalid partition"):
        executor.execute(bad, ignore)
