"""The graph of a run: its nodes, what they read, and the identity of each, known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.config import RunConfig
from pipelines import fingerprint
from pipelines.data.config import PrepareJob
from pipelines.settings import Settings
from pipelines.stage import STAGES, Stage


@dataclass(frozen=True)
class Node:
    """One stage execution."""

    name: str
    stage: Stage
    config: Settings
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input name -> name of the node that makes it."""


@dataclass(frozen=True)
class Identified:
    """A node with its identity."""

    node: Node
    identity: Mapping[str, Any]
    input_keys: Mapping[str, str]
    """Input name -> fingerprint of what it reads (or the data hash)."""

    @property
    def fingerprint(self) -> str:
        """sha256 that the node's artifact is found by."""
        return fingerprint.digest(self.identity)

    @property
    def lineage(self) -> str:
        """sha256 that its unfinished work is found by."""
        return fingerprint.digest(self.node.stage.lineage(self.node.config, self.input_keys))


def nodes(config: RunConfig) -> list[Node]:
    """Return the nodes in an order in which each comes after its inputs."""
    graph = [
        Node("prepare", STAGES["prepare"], PrepareJob(data=config.data, prepare=config.prepare)),
        Node("pretrain", STAGES["pretrain"], config.pretrain, {"prepare": "prepare"}),
        Node("evaluate.pretrain", STAGES["evaluate"], config.evaluate, {"prepare": "prepare", "model": "pretrain"}),
    ]
    models = {"pretrain": "pretrain"}
    for child in config.compress:
        source = models[child.from_ or "pretrain"]
        models[child.name] = f"compress.{child.name}"
        graph.append(Node(models[child.name], STAGES["compress"], child, {"prepare": "prepare", "model": source}))
        graph.append(_evaluation_of(child.name, models[child.name], config))
    inputs = {"prepare": "prepare"}
    for name, model in models.items():
        inputs |= {f"model:{name}": model, f"evaluation:{name}": f"evaluate.{name}"}
    graph.append(Node("promote", STAGES["promote"], config.promote, inputs))
    return graph


def _evaluation_of(child: str, model: str, config: RunConfig) -> Node:
    """Measure a child beside the pretrained model, also when other children lie between the two."""
    inputs = {
        "prepare": "prepare",
        "model": model,
        "parent_model": "pretrain",
        "parent_evaluation": "evaluate.pretrain",
    }
    return Node(f"evaluate.{child}", STAGES["evaluate"], config.evaluate, inputs)


def identify(config: RunConfig, data_hash: str) -> dict[str, Identified]:
    """Return every node of the graph with its identity, in execution order.

    A node's identity holds the *fingerprints* of its inputs, so the whole plan is known before anything has run.

    Args:
        config: the run.
        data_hash: DVC hash of the corpus, the one input that comes from outside.
    """
    identified: dict[str, Identified] = {}
    for node in nodes(config):
        keys = {name: identified[source].fingerprint for name, source in node.inputs.items()} or {"data": data_hash}
        identified[node.name] = Identified(node, node.stage.identity(node.config, keys), keys)
    return identified
