"""The executor `kubernetes` without a cluster: its manifests against the published models of JobSet and of pods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job_spec import IoK8sApiBatchV1JobSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from flows import executors
from flows.executors import kubernetes
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError
from pipelines.core.request import StageRequest
from pipelines.core.stage import TrackingTarget
from tests.pipelines.core.toy_stages import request


def asked(**changes: Any) -> StageRequest:
    table = {"executor": "kubernetes", "container": "registry.example/us/ingot:1", "cpus": 8, **changes}
    one = request(Path("/unused"), compute=ComputeConfig.model_validate(table))
    return one.model_copy(update={"store": "s3://bucket/store", "project": "/home/us/project"})


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_manifest_is_what_the_published_models_know(nodes: int) -> None:
    """The models drop what they do not know, so what comes back has to be what went in."""
    one = asked(nodes=nodes, gpus_per_node=2, node_memory=64, partition="gpus", grace_s=60)
    made = kubernetes.manifest("ingot-toy-1", one)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    resources = container.pop("resources")  # the models take a quantity for an object, and it is a text
    assert JobsetV1alpha2JobSet.model_validate(made).to_dict() == made
    assert IoK8sApiBatchV1JobSpec.model_validate(job).to_dict() == job
    assert job["completions"] == job["parallelism"] == nodes
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 90
    assert resources.keys() == {"limits", "requests"}
    assert resources["limits"] == {"cpu": "8", "memory": "64000000000", "nvidia.com/gpu": "2"}
    assert f"--nodes {nodes} " in container["command"][-1]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert yaml.safe_load(executors.get(one.compute).described(one)).keys() == made.keys()


def test_a_typing_error_in_a_manifest_would_be_found() -> None:
    made = kubernetes.manifest("ingot-toy-1", asked(cpus=None))
    made["spec"]["failurePolicy"]["maxRestart"] = 1
    assert JobsetV1alpha2JobSet.model_validate(made).to_dict() != made


def test_a_password_is_in_the_secret_alone() -> None:
    uri = "postgresql://us:s3cret@host/db"
    one = asked().model_copy(update={"tracking": TrackingTarget(uri=uri)})
    secret = kubernetes._secret("ingot-toy-1", one)
    there = StageRequest.model_validate_json(secret["stringData"]["request.json"])
    assert (there.tracking.uri, there.project) == (uri, None)
    assert "s3cret" not in json.dumps(kubernetes.manifest("ingot-toy-1", one))


def test_what_pods_cannot_do_is_known_beforehand(tmp_path: Path) -> None:
    one = request(tmp_path, compute=ComputeConfig(executor="kubernetes"), alone=True)
    problems = list(executors.get(one.compute).problems([one]))
    assert [problem.partition(":")[0] for problem in problems] == ["toy.a", "pods share no disk", "toy.a"]


def test_a_machine_without_kubectl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no kubectl here"):
        executors.get(asked().compute).adopt(asked())
