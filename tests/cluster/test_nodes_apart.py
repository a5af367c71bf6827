"""One training on two nodes that share no disk, only a store on S3: the bytes of a training on one machine."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

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

pytestmark = [pytest.mark.slow, pytest.mark.cluster_full]


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
