"""One training on two nodes that share no disk, only a store on S3: the bytes of a training on one machine."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows import executors
from pipelines.core import program, rendezvous, run_stage
from pipelines.core.artifact import MANIFEST, Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import TransientError
from pipelines.core.fingerprint import digest
from pipelines.core.ranks import free_port
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.store import Store, open_store
from pipelines.stages import STAGES
from pipelines.training.config import PretrainConfig
from pipelines.training.metrics import read_records
from tests.cluster.slurm_servers import Slurm, wait_for
from tests.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.cluster_full, pytest.mark.timeout(2400)]


def put(store: Store, prepared: Artifact) -> str:
    """Publish the corpus in a store; return its fingerprint there."""
    identity = {"stage": "prepare", "tiny": True}
    key = digest(identity)
    with store.lease("prepare", key, wait_s=0) as lease:
        build = store.build_folder("prepare", key)
        shutil.copytree(prepared.path, build, dirs_exist_ok=True)
        (build / MANIFEST).unlink()
        store.publish(build, "prepare", key, lease, node="prepare", identity=identity, parents={}, summary={})
    return key


def request(store: Store, key: str, settings: dict[str, Any], nodes: int) -> StageRequest:
    """Return the request for a training."""
    table = {"device": "cpu", "nodes": nodes, "node_timeout_s": 10.0, "grace_s": 5.0}
    config = PretrainConfig.model_validate(settings)
    return StageRequest(
        stage="pretrain",
        node="pretrain",
        fingerprint=digest(STAGES["pretrain"].identity(config, {"prepare": key})),
        configuration=settings,
        inputs={"prepare": ArtifactRef(stage="prepare", fingerprint=key)},
        data_hash="tiny",
        store=store.address,
        compute=ComputeConfig.model_validate(table),
    )


def test_a_rank_without_the_disk_of_the_first_is_killed_and_goes_on(
    prepared: Artifact, tiny_settings: dict[str, Any], s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 2: each rank writes a share of every checkpoint, and reads one that has both."""
    settings = {**tiny_settings, "world_size": 2, "zero_stage": 2, "checkpoint": {"every": 2}}
    alone = open_store(tmp_path / "alone")
    undisturbed = run_stage.execute(request(alone, put(alone, prepared), settings, nodes=1))

    store = open_store(s3_store)
    asked = request(store, put(store, prepared), settings, nodes=2)
    where, key = f"127.0.0.1:{free_port()}", secrets.token_hex(8)
    plan = tmp_path / "faults.json"
    plan.write_text(json.dumps([{"point": "train.after_step", "rank": 1, "step": 5, "action": "SIGKILL"}]))
    for name, value in {"RENDEZVOUS": where, "RENDEZVOUS_KEY": key, "FAULTS": str(plan)}.items():
        monkeypatch.setenv(f"INGOT_{name}", value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def come() -> subprocess.Popen[bytes]:
        options = ["--rendezvous", where, "--nodes", "2", "--node-rank", "1", "--wait-s", "60"]
        variables = {**program.environment(), rendezvous.KEY_VARIABLE: key, "INGOT_CACHE": str(tmp_path / "other")}
        return subprocess.Popen(program.command("pipelines.core.node", *options), env=variables)

    with come() as other:
        with pytest.raises(TransientError, match=r"rank 1 of 2 on node 1 .* was killed by SIGKILL"):
            run_stage.execute(asked)
        assert other.wait(30) == TransientError.exit_code
    (scratch,) = (tmp_path / "other").glob("*/scratch/pretrain-*")
    assert not list(scratch.glob("checkpoints/step-*")), "published on the first node alone"
    with come() as other:
        made = run_stage.execute(asked)
        assert other.wait(30) == 0
    assert made.read_json("observations.json")["resumed_at"] == [4]
    assert made.digest == undisturbed.digest


def test_a_node_with_its_disk_is_gone_and_the_store_is_cut_and_the_job_goes_on_by_itself(
    slurm: Slurm, s3: S3Server, prepared: Artifact, tiny_settings: dict[str, Any], s3_store: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Slurm queues the job of a node that failed again; the machine that comes back has an empty disk."""
    settings = {**tiny_settings, "world_size": 2, "zero_stage": 2, "checkpoint": {"every": 2}}
    alone = open_store(tmp_path / "alone")
    undisturbed = run_stage.execute(request(alone, put(alone, prepared), settings, nodes=1))

    store = open_store(s3_store)
    table = {"executor": "slurm", "device": "cpu", "nodes": 2, "cpus": 1, "node_timeout_s": 10.0, "grace_s": 10.0}
    compute = ComputeConfig.model_validate(table)
    asked = request(store, put(store, prepared), settings, nodes=2)
    asked = asked.model_copy(update={"compute": compute, "project": str(tmp_path)})
    plan = tmp_path / "faults.json"  # holds the training still until the node is dead, and the store away
    delays = {"point": "train.after_step", "rank": 1, "action": "delay", "seconds": 60.0}
    plan.write_text(json.dumps([{**delays, "step": 5}, {**delays, "step": 6, "seconds": 1.0}]))
    monkeypatch.setenv("INGOT_FAULTS", str(plan))
    monkeypatch.setenv("INGOT_CACHE", f"{tmp_path}/disk-$SLURMD_NODENAME")

    def record() -> str | None:
        return store.read(f"scratch/{store.scratch('pretrain', resume_key(asked)).name}/checkpoints/step-00000004.json")

    def attempts() -> list[int]:
        found = [read_records(path) for path in tmp_path.glob("disk-n1/*/scratch/*/attempts.jsonl")]
        return [attempt["resumed_at"] for attempt in found[0]] if found else []

    executor = executors.get(compute)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.execute, asked, lambda _progress: None)
        wait_for(lambda: future.done() or record() is not None, "a checkpoint in the store", 600)
        (job,) = slurm.active()
        slurm.kill_node("n1")
        shutil.rmtree(tmp_path / "disk-n1")
        slurm.start_node("n1")
        wait_for(lambda: future.done() or attempts()[-1:] == [4], "the training to go on from the store", 900)
        with s3.away():
            time.sleep(20)  # the store is cut for so long
        made = future.result(600)
        assert "Restarts=1" in slurm.ask("scontrol", "show", "job", job)
    assert made.read_json("observations.json")["resumed_at"] == [4]
    assert made.digest == undisturbed.digest


def resume_key(asked: StageRequest) -> str:
    stage = asked.described()
    return digest(stage.resume_key(stage.configured(asked.configuration), asked.input_keys()))
