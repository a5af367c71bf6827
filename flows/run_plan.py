"""What a run will do, made once and handed on: configuration, corpus, initial weights, graph and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import graph, planner, recipe
from flows.config import RunConfig
from flows.graph import Identified
from flows.planner import Selection, Step
from flows.run_record import RunRecord, Runs
from pipelines.core import project as projects
from pipelines.core.machine import machine_of
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.stage import TrackingTarget
from pipelines.core.store import Store, open_store
from pipelines.data import versioning

if TYPE_CHECKING:
    from pipelines.registry.initial_weights import Source


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before a run starts."""

    recipe: str
    """Its name or path; of a run that is repeated or gone on with, the recipe of that run."""
    project: Path
    """Root of the project."""
    overrides: tuple[str, ...]
    """Those of the command, and the weights that the command began with when it was cut off."""
    config: RunConfig
    selection: Selection
    store: Store
    data_hash: str
    """DVC hash of the corpus."""
    init_weights: Source | None
    """What `base.from` led to when the plan was made."""
    graph: Mapping[str, Identified]
    """Nodes by name, in an order in which each comes after its inputs."""
    steps: tuple[Step, ...]

    def wanted(self) -> list[str]:
        """Return the names of the nodes to execute, in order."""
        return [name for name, node in self.graph.items() if not self.selection.leaves_out(node, self.graph)]

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
        ranks, cores = node.node.config.ranks_and_cores
        inputs = {key: self.graph[source] for key, source in node.node.inputs.items()}
        return StageRequest(
            stage=node.node.stage.name,
            node=name,
            fingerprint=node.fingerprint,
            configuration=node.node.config.model_dump(mode="json", by_alias=True, exclude_unset=True),
            inputs={k: ArtifactRef(stage=i.node.stage.name, fingerprint=i.fingerprint) for k, i in inputs.items()},
            data_hash=None if node.node.stage.corpus == "none" else self.data_hash,
            store=self.store.address,
            project=str(self.project),
            compute=self.config.compute.at(node.node.stage.name, ranks=ranks, cores=cores),
            tracking=tracking or TrackingTarget(),
            force=force,
            alone=node.node.config.measures_time,
            wait_s=wait_s,
        )

    def is_done(self) -> bool:
        """Return whether nothing is left to run."""
        return planner.is_done(self.steps)


def make(
    name: str | None = None,
    overrides: Sequence[str] = (),
    selection: Selection | None = None,
    *,
    project: Path | None = None,
    elsewhere: bool = False,
) -> RunPlan:
    """Return the plan of a run; touches nothing.

    Args:
        name: a recipe, by name or path, or a run whose configuration is taken; the project's own recipe if left out.
        overrides: `dotted.path=value` settings over the recipe; relative paths in them start at the working directory.
        selection: nodes that were asked for.
        project: root of the project; the one around the working directory if left out.
        elsewhere: the plan is for a machine that is not this one; so it is also where an executor carries stages away.

    Raises:
        ConfigError: a setting, a stage or a model that does not exist, or a stage that cannot fit into memory; no
            project here.
        TransientError: the registry that `base.from` names does not answer.
    """
    root = project or projects.find()
    name, given = recipe.from_here(name, overrides, root)
    config, pinned = _resolve(name, given, root)
    if (repeated := recipe.run_called(name, root)) is not None:
        name, pinned = repeated.recipe, [*repeated.overrides, *pinned]
    return _of(config, name, pinned, selection or Selection(), root, elsewhere=elsewhere)


def again(record: RunRecord, store: Store, change: Mapping[str, Any], selection: Selection) -> RunPlan:
    """Return the plan of a run with the configuration that an earlier one had, in that one's store and project.

    Neither its recipe nor the folder it was started in is asked: the record has every setting.

    Args:
        record: the earlier run.
        store: where its record lies.
        change: dotted path -> value to set instead.
        selection: nodes that are asked for.

    Raises:
        ConfigError: this checkout no longer knows a setting, or one held a secret.
    """
    table = record.table(full=True)
    overrides = [f"{path}={value}" for path, value in change.items()]
    for override in overrides:
        recipe.apply(table, override)
    table["store"] = {"path": store.address}
    pinned = [*record.pin(record.overrides), *overrides]
    known = record.project is not None and projects.find_any(Path(record.project)) == Path(record.project)
    root = Path(record.project) if known and record.project else projects.find()
    return _of(recipe.validated(table, root), record.recipe, pinned, selection, root)


def _of(
    config: RunConfig, name: str, overrides: list[str], selection: Selection, root: Path, *, elsewhere: bool = False
) -> RunPlan:
    store = open_store(config.store.path, root)
    data_hash = versioning.data_hash(config.data, root)
    init_weights = graph.init_weights_of(config, store.root, root)
    identified = graph.identify(config, data_hash, init_weights)
    machine = machine_of(config.compute, elsewhere=elsewhere or config.compute.executor != "local")
    corpus_bytes = versioning.tracked_bytes(config.data, root)
    last = Runs(store.root).last_of(name)
    steps = planner.make(identified, store, selection, machine=machine, corpus_bytes=corpus_bytes, last=last)
    return RunPlan(
        recipe=name,
        project=root,
        overrides=tuple(overrides),
        config=config,
        selection=selection,
        store=store,
        data_hash=data_hash,
        init_weights=init_weights,
        graph=identified,
        steps=tuple(steps),
    )


def _resolve(name: str, overrides: list[str], root: Path) -> tuple[RunConfig, list[str]]:
    """Return the configuration and its overrides.

    The same command after a kill goes on from the weights that it began with, also when it has moved the alias that
    names them itself.
    """
    config = recipe.resolve(name, overrides, root)
    if not config.base.from_:
        return config, overrides
    cut_off = Runs(open_store(config.store.path, root).root).cut_off(name, overrides)
    pinned = overrides if cut_off is None else cut_off.pin(overrides)
    return recipe.resolve(name, pinned, root), pinned


def mermaid(plan: RunPlan) -> str:
    """Return the graph as a Mermaid flowchart: a box a stage, and arrows as few as tell the order.

    What a stage reads and what it reads was made of too (the base model beside its variant) has no arrow of its own.
    """
    boxes = {name: f"n{position}" for position, name in enumerate(plan.graph)}
    ancestors: dict[str, set[str]] = {}
    lines = ["flowchart LR", f'  corpus[("{plan.config.data.tracked_by}")]']
    lines += [f'  {boxes[step.node]}["{step.node}<br/>{step.state}"]:::{step.state}' for step in plan.steps]
    for name, node in plan.graph.items():
        sources = set(node.node.inputs.values())
        further = set().union(*(ancestors[source] for source in sources))
        ancestors[name] = sources | further
        if "data" in node.input_keys:
            lines.append(f"  corpus --> {boxes[name]}")
        lines += [f"  {boxes[source]} --> {boxes[name]}" for source in plan.graph if source in sources - further]
    return "\n".join([*lines, "  classDef cached stroke-dasharray:4", "  classDef run,waits stroke-width:3px"])
