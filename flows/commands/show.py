"""status, show, diff: the verbs that look and change nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flows import console, recipe
from flows.commands.lookup import find, store
from flows.commands.run import headline
from flows.run_record import RunRecord, Runs
from pipelines.core import fingerprint
from pipelines.core.artifact import Artifact
from pipelines.core.redaction import redact_value


def status(run_id: str | None, *, as_json: bool) -> None:
    """Print how far a run is."""
    record = Runs(store().root).get(run_id)
    if as_json:
        print(json.dumps(record.model_dump() | {"status": record.state}, indent=1))
    else:
        _show_status(record)


def _show_status(record: RunRecord) -> None:
    print(f"{record.id}  {record.state}  started {record.started_at}  recipe {record.recipe}")
    console.table(
        [_node_row(name, node) for name, node in record.nodes.items()],
        ["stage", "state", "took", "result"],
        as_json=False,
    )
    if record.error:
        print(f"error: {record.error}")
    if record.unfinished:
        print(f"Go on with: ingot resume {record.id}")


def show(target: str, recipe_name: str, overrides: list[str], *, as_json: bool) -> None:
    """Print one run, one artifact, the resolved configuration, or its JSON schema."""
    if target == "config":
        print(json.dumps(redact_value("", recipe.resolve(recipe_name, overrides).model_dump(mode="json")), indent=1))
    elif target == "schema":
        from flows.config import RunConfig

        print(json.dumps(RunConfig.model_json_schema(), indent=1))
    else:
        found = find(target)
        if isinstance(found, RunRecord):
            _show_run(found, as_json=as_json)
        else:
            _show_artifact(found, as_json=as_json)


def diff(old: str, new: str, *, as_json: bool) -> None:
    """Print which fields differ between two runs or artifacts."""
    changes = fingerprint.explain(_facts(find(old)), _facts(find(new)))
    rows = [{"field": c.path, "old": _plain(c.old), "new": _plain(c.new)} for c in changes]
    if not rows and not as_json:
        print("no difference")
        return
    console.table(rows, ["field", "old", "new"], as_json=as_json)


def _show_run(record: RunRecord, *, as_json: bool) -> None:
    """Print how far a run is, and its children from the smallest to the largest."""
    children = Runs(store().root).pareto(record.id)
    if as_json:
        print(json.dumps(record.model_dump() | {"status": record.state, "pareto": children}, indent=1))
        return
    _show_status(record)
    if children:
        tokens = children[0].get("cache_tokens")
        counted = f" Sizes are with a cache of {tokens:,} tokens." if tokens else ""
        print(f"Children by size; ratios are to the parent's bits per byte, baselines on validation text.{counted}")
        columns = ["child", "method", "bits", "size", "ratio", "interval", "best", "baselines"]
        console.table([_child_row(row) for row in children], columns, as_json=False)


def _child_row(row: dict[str, Any]) -> dict[str, Any]:
    bits = row.get("bits_per_cached_number") or row["bits_per_weight"]
    baselines = [(name, measured["ratio"]["value"]) for name, measured in row["baselines"].items()]
    measured = row["ratio"] is not None
    return {
        "child": row["model"],
        "method": row["method"],
        "bits": f"{bits:.3g}{' cached' if row.get('bits_per_cached_number') else ''}" if bits else None,
        "size": console.size(round(row.get("footprint_bytes", row["size_bytes"]))),
        "ratio": f"{row['ratio']:.5f}" if measured else None,
        "interval": f"[{row['ratio_low']:.5f}, {row['ratio_high']:.5f}]" if measured else None,
        "best": "best" if row["best"] else "",
        "baselines": ", ".join(f"{name} {value:.5f}" for name, value in sorted(baselines, key=lambda pair: pair[1])),
    }


def _facts(found: RunRecord | Artifact) -> dict[str, Any]:
    """Return what is worth comparing: settings, inputs, results; never times or places."""
    if isinstance(found, RunRecord):
        results = {name: node.summary for name, node in found.nodes.items()}
        return {"config": found.config, "data": found.data_hash, "results": results}
    manifest = found.manifest
    return {"identity": manifest.identity, "parents": manifest.parents, "results": manifest.summary}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict) or value is None else "(absent)"


def _node_row(name: str, node: Any) -> dict[str, str]:
    at_work = f"{node.done}/{node.total}  {node.message}" if node.state == "running" else node.message
    return {
        "stage": name,
        "state": node.state,
        "took": console.duration(node.seconds),
        "result": headline(node.summary) or at_work,
    }


def _show_artifact(found: Artifact, *, as_json: bool) -> None:
    manifest = found.manifest
    if as_json:
        print(json.dumps(manifest.model_dump() | {"digest": found.digest, "path": str(found.path)}, indent=1))
        return
    print(f"{manifest.node}  {found.path}")
    print(
        f"  fingerprint {manifest.fingerprint}\n  digest      {found.digest}\n  size        {console.size(found.size)}"
    )
    if manifest.provenance is not None:
        for key, value in manifest.provenance.model_dump().items():
            print(f"  {key:<15}{value}")
    print("lineage:")
    for line in _lineage(found, {stored.manifest.fingerprint: stored for stored in store().artifacts()}):
        print(f"  {line}")
    print("result:")
    for key, value in manifest.summary.items():
        print(f"  {key:<28}{json.dumps(value)}")
    print(f"files: {len(manifest.files)}")
    for name, record in list(manifest.files.items())[:20]:
        print(f"  {record.sha256[:12]}  {console.size(record.size):>9}  {name}")


def _lineage(found: Artifact, stored: Mapping[str, Artifact], depth: int = 0) -> list[str]:
    """Return the ancestors of an artifact, one line each, corpus last; `stored` is the store by fingerprint.

    Digests do not name ancestors: two stages whose results have the same bytes share one.
    """
    keys = found.manifest.identity.get("inputs", {})
    lines = []
    for name, digest in found.manifest.parents.items():
        parent = stored.get(keys.get(name, ""))
        if parent is not None and parent.digest != digest:
            parent = None  # it was made again since, with other bytes
        node = parent.manifest.node if parent else "(not in this store)"
        lines.append("  " * depth + f"{name}: {node} {digest[:12]}")
        if parent is not None:
            lines += _lineage(parent, stored, depth + 1)
    if found.manifest.stage == "fetch":
        made_by = found.manifest.summary.get("origin")
        lines.append("  " * depth + f"from: {found.manifest.summary['source']} {(made_by or '')[:12]}".rstrip())
    elif "data" in keys or not found.manifest.parents:
        lines.append("  " * depth + f"corpus: data.dvc {keys.get('data', '?')}")
    return lines
