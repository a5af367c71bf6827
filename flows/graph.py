"""The graph of a run: its nodes, what they read, and the identity of each, known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import RunConfig
from models.architectures.config import Shape
from models.architectures.describe import shape_of
from pipelines.core import fingerprint
from pipelines.core.errors import ConfigError
from pipelines.core.settings import Settings
from pipelines.core.stage import Stage
from pipelines.data.config import PrepareJob
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import FetchConfig
from pipelines.stages import STAGES
from pipelines.training.config import ModelOverrides, PretrainConfig

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
    """Return the model that `base.from` names at this moment; asks the registry only where it is set.

    Raises:
        ConfigError: there is no such model.
        TransientError: the registry does not answer.
    """
    if not config.base.from_:
        return None
    from pipelines.registry import initial_weights

    return initial_weights.resolve(config.base.from_, config.tracking, store_root, project)


def nodes(config: RunConfig, init_weights: Source | None = None) -> list[Node]:
    """Return the nodes in an order in which each comes after its inputs."""
    base = config.base_name
    fetch = "fetch" if config.trains else base
    fetched = {} if init_weights is None else {"init_weights": fetch}
    tokenizer = fetched if config.prepare.tokenizer == "init_weights" else {}
    graph = [] if init_weights is None else [_fetching(fetch, init_weights)]
    graph.append(Node("prepare", STAGES["prepare"], PrepareJob(data=config.data, prepare=config.prepare), tokenizer))
    trained = trained_from(config.pretrain, init_weights) if config.trains else config.pretrain
    if config.trains:
        graph.append(Node(base, STAGES["pretrain"], trained, {"prepare": "prepare", **fetched}))
    reads = {"prepare": "prepare", "model": base}
    graph.append(Node(f"evaluate.{base}", STAGES["evaluate"], config.evaluate, reads))
    for baseline in config.baselines:
        name = f"pretrain.{baseline.name}"
        graph.append(Node(name, STAGES["pretrain"], baseline.of(trained), {"prepare": "prepare", **fetched}))
        graph.append(_evaluation_of(f"compare.{baseline.name}", name, base, config.evaluate.text_alone()))
    models = {base: base}
    for variant in config.compress:
        source = models[variant.from_ or base]
        models[variant.name] = f"compress.{variant.name}"
        reads = {"prepare": "prepare", "model": source}
        if variant.from_ and variant.needs_teacher:
            reads["teacher"] = base
        graph.append(Node(models[variant.name], STAGES["compress"], variant, reads))
        graph.append(_evaluation_of(f"evaluate.{variant.name}", models[variant.name], base, config.evaluate))
    if config.promote.enabled:
        graph.append(Node("promote", STAGES["promote"], config.promote, judged(models)))
    return graph


def judged(models: Mapping[str, str]) -> dict[str, str]:
    """Return the nodes that tell of models; `models` maps the name of each to the node that makes it."""
    inputs = {"prepare": "prepare"}
    for name, model in models.items():
        inputs |= {f"model:{name}": model, f"evaluation:{name}": f"evaluate.{name}"}
    return inputs


def trained_from(config: PretrainConfig, source: Source | None) -> PretrainConfig:
    """Return the settings of a training: those of the recipe, with the shape of the weights that it starts from.

    A shape in the recipe must be the same.

    Raises:
        ConfigError: weights of that shape cannot be trained on here.
    """
    if source is None or not source.config:
        return config
    try:
        shape = shape_of(source.config)
        if not config.model_fields_set & {"family", "preset", "model"}:
            return _shaped(config, shape)
    except ValueError as error:
        hint = "leave out the section [pretrain]: without training, models of other families are taken as they are"
        raise ConfigError(f"base.from = {source.place!r} cannot be trained on: {error}", hint=hint) from error
    ours, theirs = config.shape.model_dump(), shape.model_dump()
    free = {"init_std", *(["local_window", "global_every"] if shape.family == "decoder" else ["head_width"])}
    other = [f"{name} is {theirs[name]}, this run's is {ours[name]}" for name in theirs if theirs[name] != ours[name]]
    if other := [line for line in other if line.split()[0] not in free]:
        raise ConfigError(
            f"base.from = {source.place!r} has another shape: {'; '.join(other[:3])}",
            hint="leave out pretrain.family, pretrain.preset and pretrain.model: config.json has the shape",
        )
    return config


def _shaped(config: PretrainConfig, shape: Shape) -> PretrainConfig:
    """Return the settings of a training for a model of another shape.

    Raises:
        ValueError: another setting does not fit it.
    """
    values = {name: value for name, value in shape.model_dump().items() if name in ModelOverrides.model_fields}
    values |= {"kv_heads": shape.key_heads} if shape.family == "decoder" else {}
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return PretrainConfig.model_validate(given | {"family": shape.family, "model": values})


def _fetching(name: str, source: Source) -> Node:
    settings = FetchConfig(place=source.place, weights=source.weights, origin=source.origin)
    return Node(name, STAGES["fetch"], settings, note=source.note)


def _evaluation_of(name: str, model: str, base: str, config: EvaluateConfig) -> Node:
    """Measure a model beside the base model, also when variants lie between the two."""
    inputs = {
        "prepare": "prepare",
        "model": model,
        "base_model": base,
        "base_evaluation": f"evaluate.{base}",
    }
    return Node(name, STAGES["evaluate"], config, inputs)


def identify(config: RunConfig, data_hash: str, init_weights: Source | None = None) -> dict[str, Identified]:
    """Return every node of the graph with its identity, in execution order.

    A node's identity holds the *fingerprints* of its inputs, so the whole plan is known before anything has run.

    Args:
        config: the run.
        data_hash: DVC hash of the corpus.
        init_weights: the model that the run starts from; with the corpus, all that comes from outside.
    """
    identified: dict[str, Identified] = {}
    for node in nodes(config, init_weights):
        keys = {name: identified[source].fingerprint for name, source in node.inputs.items()}
        if node.stage.corpus == "reads":
            keys["data"] = data_hash
        identified[node.name] = Identified(node, node.stage.identity(node.config, keys), keys)
    return identified
