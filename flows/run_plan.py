"""What a run will do, made once and handed on: configuration, corpus, initial weights, graph and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows import graph, planner, recipe
from flows.config import RunConfig
from flows.graph import Identified
from flows.planner import Selection, Step
from flows.run_record import Runs
from pipelines.core.provenance import CHECKOUT
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.stage import TrackingTarget
from pipelines.core.store import Store
from pipelines.data import versioning

if TYPE_CHECKING:
    from pipelines.registry.initial_weights import Source


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before a run starts."""

    recipe: str
    overrides: tuple[str, ...]
    """Those of the command, and the weights that the command began with when it was cut off."""
    config: RunConfig
    selection: Selection
    store: Store
    data_hash: str
    """DVC hash of the corpus."""
    init_weights: Source | None
    """What `pretrain.from` led to when the plan was made."""
    graph: Mapping[str, Identified]
    """Nodes by name, in an order in which each comes after its inputs."""
    steps: tuple[Step, ...]

    def wanted(self) -> list[str]:
        """Return the names of the nodes to execute, in order."""
        return [name for name, node in self.graph.items() if not self.selection.leaves_out(node)]

    def request(
        self,
        name: str,
        *,
        tracking: TrackingTarget | None = None,
        force: bool = False,
        wait_s: float | None = None,
    ) -> StageRequest:
        """Return the execution of one node as a value; see `pipelines.core.request`."""
        node = self.graph[name]
        inputs = {key: self.graph[source] for key, source in node.node.inputs.items()}
        return StageRequest(
            stage=node.node.stage.name,
            node=name,
            fingerprint=node.fingerprint,
            configuration=node.node.config.model_dump(mode="json", by_alias=True, exclude_unset=True),
            inputs={k: ArtifactRef(stage=i.node.stage.name, fingerprint=i.fingerprint) for k, i in inputs.items()},
            data_hash=None if node.node.stage.corpus == "none" else self.data_hash,
            store=str(self.store.root),
            compute=self.config.compute,
            tracking=tracking or TrackingTarget(),
            force=force,
            wait_s=wait_s,
        )

    def is_done(self) -> bool:
        """Return whether nothing is left to run."""
        return planner.is_done(self.steps)


def make(name: str, overrides: Sequence[str] = (), selection: Selection | None = None) -> RunPlan:
    """Return the plan of a run; touches nothing.

    Args:
        name: a recipe, by name or path.
        overrides: `dotted.path=value` settings over the recipe.
        selection: nodes that were asked for.

    Raises:
        ConfigError: a setting, a stage or a model that does not exist.
        TransientError: the registry that `pretrain.from` names does not answer.
    """
    selection = selection or Selection()
    config, pinned = _resolve(name, list(overrides))
    store = Store(CHECKOUT / config.store.path)
    data_hash = versioning.data_hash(config.data, CHECKOUT)
    init_weights = graph.init_weights_of(config, store.root)
    identified = graph.identify(config, data_hash, init_weights)
    steps = planner.make(identified, store, selection)
    return RunPlan(name, tuple(pinned), config, selection, store, data_hash, init_weights, identified, tuple(steps))


def _resolve(name: str, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """Return the configuration and its overrides.

    The same command after a kill goes on from the weights that it began with, also when it has moved the alias that
    names them itself.
    """
    config = recipe.resolve(name, overrides)
    if not config.pretrain.from_:
        return config, overrides
    cut_off = Runs(Store(CHECKOUT / config.store.path).root).cut_off(name, overrides)
    pinned = overrides if cut_off is None else cut_off.pin(overrides)
    return recipe.resolve(name, pinned), pinned
