"""The graph of a run: its nodes, what they read, and the identity of each, known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import RunConfig
from pipelines.core import fingerprint
from pipelines.core.settings import Settings
from pipelines.core.stage import Stage
from pipelines.data.config import PrepareJob
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import FetchConfig
from pipelines.stages import STAGES

if TYPE_CHECKING:
    from pipelines.registry.initial_weights import Source


@dataclass(frozen=True)
class Node:
    """One stage execution."""

    name: str
    stage: Stage
    config: Settings
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input name -> name of the node that makes it."""
    note: str = ""
    """What the plan says of it besides why it runs."""


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
    def resume_key(self) -> str:
        """sha256 that its unfinished work is found by."""
        return fingerprint.digest(self.node.stage.resume_key(self.node.config, self.input_keys))


def init_weights_of(config: RunConfig, store_root: Path, project: Path) -> Source | None:
    """Return the weights that `pretrain.from` names at this moment; asks the registry only where it is set.

    Raises:
        ConfigError: there is no such model.
        TransientError: the registry does not answer.
    """
    if not config.pretrain.from_:
        return None
    from pipelines.registry import initial_weights

    return initial_weights.resolve(config.pretrain.from_, config.tracking, store_root, project)


def nodes(config: RunConfig, init_weights: Source | None = None) -> list[Node]:
    """Return the nodes in an order in which each comes after its inputs."""
    fetched = {} if init_weights is None else {"init_weights": "fetch"}
    tokenizer = fetched if config.prepare.tokenizer == "init_weights" else {}
    graph = [] if init_weights is None else [_fetching(init_weights)]
    graph += [
        Node("prepare", STAGES["prepare"], PrepareJob(data=config.data, prepare=config.prepare), tokenizer),
        Node("pretrain", STAGES["pretrain"], config.pretrain, {"prepare": "prepare", **fetched}),
        Node("evaluate.pretrain", STAGES["evaluate"], config.evaluate, {"prepare": "prepare", "model": "pretrain"}),
    ]
    for baseline in config.baselines:
        trained = f"pretrain.{baseline.name}"
        graph.append(Node(trained, STAGES["pretrain"], baseline.of(config.pretrain), {"prepare": "prepare", **fetched}))
        graph.append(_evaluation_of(f"compare.{baseline.name}", trained, config.evaluate.text_alone()))
    models = {"pretrain": "pretrain"}
    for variant in config.compress:
        source = models[variant.from_ or "pretrain"]
        models[variant.name] = f"compress.{variant.name}"
        reads = {"prepare": "prepare", "model": source}
        if variant.from_ and variant.needs_teacher:
            reads["teacher"] = "pretrain"
        graph.append(Node(models[variant.name], STAGES["compress"], variant, reads))
        graph.append(_evaluation_of(f"evaluate.{variant.name}", models[variant.name], config.evaluate))
    inputs = {"prepare": "prepare"}
    for name, model in models.items():
        inputs |= {f"model:{name}": model, f"evaluation:{name}": f"evaluate.{name}"}
    graph.append(Node("promote", STAGES["promote"], config.promote, inputs))
    return graph


def _fetching(source: Source) -> Node:
    settings = FetchConfig(place=source.place, weights=source.weights, origin=source.origin)
    return Node("fetch", STAGES["fetch"], settings, note=source.note)


def _evaluation_of(name: str, model: str, config: EvaluateConfig) -> Node:
    """Measure a model beside the pretrained one, also when variants lie between the two."""
    inputs = {
        "prepare": "prepare",
        "model": model,
        "base_model": "pretrain",
        "base_evaluation": "evaluate.pretrain",
    }
    return Node(name, STAGES["evaluate"], config, inputs)


def identify(config: RunConfig, data_hash: str, init_weights: Source | None = None) -> dict[str, Identified]:
    """Return every node of the graph with its identity, in execution order.

    A node's identity holds the *fingerprints* of its inputs, so the whole plan is known before anything has run.

    Args:
        config: the run.
        data_hash: DVC hash of the corpus.
        init_weights: weights that training starts from; with the corpus, all that comes from outside.
    """
    identified: dict[str, Identified] = {}
    for node in nodes(config, init_weights):
        keys = {name: identified[source].fingerprint for name, source in node.inputs.items()}
        if node.stage.corpus == "reads":
            keys["data"] = data_hash
        identified[node.name] = Identified(node, node.stage.identity(node.config, keys), keys)
    return identified
