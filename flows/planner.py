"""What a run will do and why: read from manifests and configuration alone, touching nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flows.graph import Identified
from pipelines.core import fingerprint
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.estimate import Estimate, EstimateContext, refuse_what_does_not_fit
from pipelines.core.machine import Machine
from pipelines.core.store import Store

State = Literal["cached", "run", "waits", "skip"]
_REASONS_SHOWN = 3


@dataclass(frozen=True)
class Step:
    """One line of a plan."""

    node: str
    stage: str
    fingerprint: str
    state: State
    why: str
    estimate: Estimate
    """What running it takes, also of a node that need not run."""
    warning: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is work to be done."""
        return self.state in {"run", "waits"}

    @property
    def seconds(self) -> float | None:
        """Seconds that it takes; None where it does not run, or where nothing is known."""
        return self.estimate.time.seconds if self.runs and self.estimate.time else None

    def as_dict(self, price_per_hour: float | None = None) -> dict[str, Any]:
        """Return the step as JSON values; `price_per_hour` is that of one rank."""
        cost = self.estimate.cost(price_per_hour) if self.runs else None
        return {**vars(self), "estimate": {**self.estimate.as_dict(), "cost": cost}}


@dataclass(frozen=True)
class Selection:
    """Which nodes the user asked for; each name is a stage or a node."""

    only: str | None = None
    since: str | None = None
    force: Collection[str] = ()
    finished: Collection[str] = ()
    """Nodes that an earlier attempt at this very run has executed: what was forced then is not forced once more."""
    keep_going: bool = False
    """Whether nodes that need nothing that failed are run all the same."""

    def check(self, graph: Mapping[str, Identified]) -> None:
        """Refuse names that are neither a node nor a stage of this graph.

        Raises:
            ConfigError: listing the names there are.
        """
        known = {*graph, *(n.node.stage.name for n in graph.values())}
        for name in (self.only, self.since, *self.force):
            if name is not None and name not in known:
                raise ConfigError(f"{name!r} is not a stage of this run", hint=f"stages: {', '.join(sorted(known))}")

    def forced(self, node: Identified, graph: Mapping[str, Identified]) -> bool:
        """Return whether the node's body must run even if its artifact exists."""
        if node.node.name in self.finished:
            return False
        return any(_named(node, name, graph) for name in self.force) or (
            self.since is not None and (_named(node, self.since, graph) or _below(node, self.since, graph))
        )

    def leaves_out(self, node: Identified, graph: Mapping[str, Identified]) -> bool:
        """Return whether `only` names something else."""
        return self.only is not None and not _named(node, self.only, graph)


def make(
    graph: Mapping[str, Identified],
    store: Store,
    selection: Selection | None = None,
    *,
    machine: Machine | None = None,
    corpus_bytes: int | None = None,
    last: Mapping[str, str] | None = None,
) -> list[Step]:
    """Return the plan of a run, one step a node, in execution order.

    Args:
        graph: the nodes.
        store: where artifacts are.
        selection: which nodes were asked for.
        machine: what computes; None for a CPU of which nothing is known.
        corpus_bytes: size of the corpus, where it is known.
        last: node -> fingerprint in the last run of the same recipe: what a node that runs is compared with first.

    Raises:
        ConfigError: a stage or node that does not exist, or one that runs and cannot fit the machine's memory.
    """
    selection = selection or Selection()
    selection.check(graph)
    history = list(store.artifacts())
    known = EstimateContext(
        machine=machine or Machine("cpu", None),
        artifacts={found.manifest.fingerprint: found for found in history},
        corpus_bytes=corpus_bytes,
    )
    steps: dict[str, Step] = {}
    for name, node in graph.items():
        steps[name] = _step(node, graph, steps, store, history, selection, known, last or {})
        if steps[name].runs:
            refuse_what_does_not_fit(name, steps[name].estimate, known.machine)
    return list(steps.values())


def is_done(steps: Collection[Step]) -> bool:
    """Return whether nothing is left to run."""
    return all(step.state in {"cached", "skip"} for step in steps)


def _step(
    node: Identified,
    graph: Mapping[str, Identified],
    before: Mapping[str, Step],
    store: Store,
    history: list[Artifact],
    selection: Selection,
    known: EstimateContext,
    last: Mapping[str, str],
) -> Step:
    name, stage, key = node.node.name, node.node.stage, node.fingerprint
    cached = store.find(stage.name, key)
    earlier = _by_distance(node, history)
    of_same_recipe = store.find(stage.name, last[name]) if name in last else None
    relative = cached or of_same_recipe or (earlier[0] if earlier else None)
    rebuilt = [source for source in node.node.inputs.values() if before[source].state in {"run", "waits"}]
    state: State
    if selection.leaves_out(node, graph):
        state, why = "skip", f"--only {selection.only}"
    elif selection.forced(node, graph):
        state, why = "run", "forced"
    elif cached and (changed := other_bytes(cached, node, graph, store)) is None:
        state, why = "cached", _cached_since(cached)
    elif cached:
        state, why = "run", f"input changed: {changed} was rebuilt with other bytes"
    elif relative is None:
        state, why = ("waits", f"needs {rebuilt[-1]}") if rebuilt else ("run", "never run")
    else:
        state, why = "run", _why(node, relative, graph)
    if state == "run" and store.has_scratch(stage.name, node.resume_key):
        why += "; goes on from its last checkpoint"
    context = replace(
        known,
        inputs={key: before[source].estimate for key, source in node.node.inputs.items()},
        made=cached,
        history=earlier,
        corpus=node.input_keys.get("data"),
    )
    estimate = stage.estimated(node.node.config, context)
    return Step(name, stage.name, key, state, why, estimate, _warning(node, cached))


def _why(node: Identified, relative: Artifact, graph: Mapping[str, Identified]) -> str:
    """Name the fields that differ from the earlier artifact that this one is compared with."""
    old, new = relative.manifest.identity, node.identity
    stage = node.node.stage.name
    fields = [
        str(fingerprint.Change(_dotted(c.path, stage), c.old, c.new))
        for c in fingerprint.explain(old["config"], new["config"])
    ]
    if old["version"] != new["version"]:
        fields.append(f"{stage} version: {old['version']} -> {new['version']}")
    if fields:
        more = f" and {len(fields) - _REASONS_SHOWN} more" if len(fields) > _REASONS_SHOWN else ""
        return ", ".join(fields[:_REASONS_SHOWN]) + more
    return _changed_inputs(old["inputs"], new["inputs"], node, graph)


def _changed_inputs(
    old: Mapping[str, str], new: Mapping[str, str], node: Identified, graph: Mapping[str, Identified]
) -> str:
    changed = sorted(name for name in new if old.get(name) != new[name])
    if changed == ["data"]:
        return f"data.dvc: {old.get('data', '(absent)')[:8]} -> {new['data'][:8]}"
    sources = [node.node.inputs[name] for name in changed if name in node.node.inputs]
    # The changed input that comes first in the graph is the cause; the others follow from it.
    causes = [name for name in graph if name in sources]
    if not causes:
        return "removed inputs: " + ", ".join(sorted(set(old) - set(new))) if set(old) - set(new) else "was removed"
    return f"input changed: {causes[0]}"


def _dotted(path: str, stage: str) -> str:
    """Turn a path inside a stage's identity into the dotted path of the recipe."""
    return path if path.startswith(("prepare.", "data.")) else f"{stage}.{path}"


def _by_distance(node: Identified, history: list[Artifact]) -> list[Artifact]:
    """Return the earlier artifacts of the stage, those that differ least first: same node, fewest fields, newest."""
    same_stage = [a for a in history if a.manifest.stage == node.node.stage.name and "config" in a.manifest.identity]

    def distance(item: tuple[int, Artifact]) -> tuple[bool, int, int]:
        age, old = item
        changes = fingerprint.explain(old.manifest.identity["config"], node.identity["config"])
        return old.manifest.node != node.node.name, len(changes), age

    return [found for _, found in sorted(enumerate(reversed(same_stage)), key=distance)]


def other_bytes(cached: Artifact, node: Identified, graph: Mapping[str, Identified], store: Store) -> str | None:
    """Return the input whose artifact no longer has the bytes that `cached` was made from, or None."""
    for name, source in node.node.inputs.items():
        current = store.find(graph[source].node.stage.name, graph[source].fingerprint)
        if current is not None and current.digest != cached.manifest.parents.get(name, current.digest):
            return source
    return None


def _cached_since(cached: Artifact) -> str:
    created = cached.manifest.provenance.created_at[:16].replace("T", " ") if cached.manifest.provenance else ""
    return f"{cached.manifest.fingerprint[:8]}, {created} UTC"


def _warning(node: Identified, cached: Artifact | None) -> str:
    if node.node.note:
        return node.node.note
    if cached is None or cached.manifest.provenance is None:
        return ""
    if cached.manifest.provenance.source_digest == node.node.stage.source_digest():
        return ""
    return f"the code of {node.node.stage.name} changed since; `--force {node.node.stage.name}` runs it again"


def _named(node: Identified, name: str, graph: Mapping[str, Identified]) -> bool:
    """Tell whether a node is meant: by its own name, or by that of its stage where no node is called so."""
    return node.node.name == name or (name not in graph and node.node.stage.name == name)


def _below(node: Identified, name: str, graph: Mapping[str, Identified]) -> bool:
    return any(_named(graph[s], name, graph) or _below(graph[s], name, graph) for s in node.node.inputs.values())
