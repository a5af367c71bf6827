"""The executor `slurm` without Slurm: what a job asks for, and what its script keeps to itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flows import executors
from flows.executors import slurm
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError
from pipelines.core.stage import TrackingTarget
from tests.pipelines.core.toy_stages import request


def compute(**asked: object) -> ComputeConfig:
    return ComputeConfig.model_validate({"executor": "slurm", **asked})


def test_a_job_asks_for_what_the_recipe_says(tmp_path: Path) -> None:
    asked = compute(
        nodes=2, gpus_per_node=4, cpus=16, node_memory=64, time="1d12h", partition="gpu", account="us", grace_s=60
    )
    one = request(tmp_path, compute=asked, project="/home/us/50% off", alone=True)
    executor = executors.get(asked)
    assert executor.described(one) == (
        "sbatch --job-name=ingot-toy.a --nodes=2 --ntasks-per-node=1 --cpus-per-task=16 --gpus-per-node=4 "
        "--mem=61035M --time=2160 --partition=gpu --account=us --signal=B:USR1@90 --open-mode=append "
        "'--chdir=/home/us/50% off' --requeue --exclusive"
    )
    assert executor.where(one) == ("slurm, 2 nodes, cores 16, GPUs 4, 64 GB, for 1d12h, in gpu, alone on its node")


def test_a_stage_in_an_image_sees_the_folders_under_their_own_names(tmp_path: Path) -> None:
    asked = compute(container="ingot.sif", gpus_per_node=1)
    command = slurm._command(request(tmp_path, compute=asked, project="/p"))
    assert command[:3] == ["apptainer", "exec", "--nv"]
    assert {"--bind=/p", f"--bind={tmp_path}"} < set(command)
    assert command[-5:] == ["ingot.sif", "python3", "-P", "-m", "pipelines.core.run_stage"]


@pytest.mark.parametrize(("nodes", "refused"), [(1, False), (2, True)])
def test_an_image_on_several_nodes_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, refused: bool
) -> None:
    monkeypatch.setattr(slurm, "_slurm", lambda *_arguments, **_options: "")
    asked = compute(container="ingot.sif", nodes=nodes)
    problems = list(slurm.Executor(asked).problems([request(tmp_path, compute=asked, project="/p")]))
    assert any("compute.container goes with one node" in problem for problem in problems) == refused


@pytest.mark.parametrize(("ending", "code"), [("exit 7", 7), ("kill -TERM $PPID; while true; do sleep 0.05; done", 75)])
def test_the_script_hands_the_request_over_and_ends_as_the_stage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, code: int
) -> None:
    """Whatever is printed of the script, the request with its password is not in it."""
    stage = tmp_path / "stage"
    stage.write_text(f"#!/bin/bash\ntrap 'exit 75' TERM\ncat > {tmp_path}/request\necho '{{}}'\n{ending}\n")
    stage.chmod(0o755)
    monkeypatch.setattr(slurm, "_command", lambda _request: [str(stage)])
    secret = TrackingTarget(uri="postgresql://us:pass'word@host/db")
    asked = request(tmp_path, compute=compute(cpus=3), tracking=secret)
    script = slurm._script(asked, tmp_path)
    done = subprocess.run(["bash", "-x"], input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "request").read_text() == asked.model_dump_json() + "\n"
    assert (tmp_path / "events.jsonl").read_text() == "{}\n"
    assert "pass" not in done.stderr
    assert "export OMP_NUM_THREADS=3\n" in script


def test_without_slurm_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = executors.get(compute())
    with pytest.raises(ConfigError, match=r"there is no squeue here: compute\.executor = slurm needs") as caught:
        executor.execute(request(tmp_path, compute=compute()), print)
    assert caught.value.hint == "run it on a login node of the cluster"
    assert list(executor.problems([request(tmp_path, compute=compute())])) == [
        "toy.a: there is no sbatch here: compute.executor = slurm needs Slurm's commands"
    ]


def test_a_controller_that_is_away_for_a_while_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (squeue := tmp_path / "squeue").write_text("#!/bin/bash\necho '7|RUNNING|None|n1|ingot:x:y'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    queue = slurm._Queue()
    before = queue.rows()
    squeue.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    assert queue.rows(max_age_s=0.0) == before
    assert before["7"].nodes == "n1"
