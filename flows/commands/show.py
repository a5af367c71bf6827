"""status, show, diff: the verbs that look and change nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from flows import console, recipe
from flows.commands.lookup import find, store
from flows.commands.run import HEADLINES, headline
from flows.run_record import RunRecord, Runs
from pipelines.core import fingerprint, project, quantity
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.redaction import redact_value
from pipelines.core.stage import Progress

_POLL_S = 0.2


def status(run_id: str | None, *, follow: bool, as_json: bool) -> int:
    """Print how far a run is.

    Args:
        run_id: id or its beginning; None for the newest.
        follow: go on until the run ends.
        as_json: print JSON, once the run has ended if it is followed.

    Returns:
        The exit code of a run that was followed to its end, else 0.
    """
    runs = Runs(store().root)
    record = runs.get(run_id)
    code = 0
    if follow:
        record = _follow(runs, record, quiet=as_json)
        code = 1 if record.exit_code is None else record.exit_code  # None: it was killed
    if as_json:
        print(json.dumps(record.model_dump() | {"status": record.state}, indent=1))
    else:
        _show_status(record)
    return code


def _follow(runs: Runs, record: RunRecord, *, quiet: bool) -> RunRecord:
    """Tell what a run at work does until it ends, however it ends; only its record is read."""
    console.set_quiet(quiet)
    told: dict[str, str] = {}
    while True:
        # When it was written is asked before it is read: what is written in between is then read in the next round.
        seen = runs.written_at(record.id)
        record = runs.get(record.id)
        for name, node in record.nodes.items():
            if node.state == "running" and node.total:
                console.progress_line(Progress(name, node.done, node.total, "", node.message))
            elif told.get(name, "waits") != node.state:
                console.say(f"{name:<22} {node.state}  {headline(node.summary) or node.message}".rstrip())
            told[name] = node.state
        if not record.at_work:
            return runs.get(record.id)
        while record.at_work and runs.written_at(record.id) == seen:
            time.sleep(_POLL_S)


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


def show(target: str, recipe_name: str | None, overrides: list[str], *, as_json: bool, as_toml: bool = False) -> None:
    """Print one run, one artifact, the resolved configuration, or its JSON schema.

    Raises:
        ConfigError: see `lookup.find`; or an option that has no meaning here.
    """
    if as_toml and (target != "config" or as_json):
        raise ConfigError("--toml prints a recipe", hint="ingot show config --toml --recipe NAME")
    if target != "config" and (recipe_name or overrides):
        given = [*(["--recipe"] if recipe_name else []), *overrides]
        raise ConfigError(
            f"{target} is what it is: {', '.join(given)} would change nothing", hint="`ingot show config`"
        )
    if target == "config":
        root = project.find_any()
        config = recipe.resolve(*recipe.from_here(recipe_name, overrides, root), root)
        text = json.dumps(redact_value("", config.model_dump(mode="json")), indent=1) + "\n"
        print(recipe.to_toml(config) if as_toml else text, end="")
    elif target == "schema":
        from flows import recipe_schema

        print(json.dumps(recipe_schema.schema(), indent=1))
    else:
        found = find(target)
        if isinstance(found, RunRecord):
            _show_run(found, as_json=as_json)
        else:
            _show_artifact(found, as_json=as_json)


def diff(old: str, new: str, *, as_json: bool) -> None:
    """Print which fields differ between two runs or artifacts: headline numbers, then settings, then other results."""
    sides = find(old), find(new)
    before, after = _facts(sides[0]), _facts(sides[1])
    one_sided = _without_counterpart(before, after) if all(isinstance(side, RunRecord) for side in sides) else []
    changes = [c for c in fingerprint.explain(before, after) if not _equal(c.old, c.new)]
    rows = [{"field": c.path, "old": _plain(c.old), "new": _plain(c.new)} for c in sorted(changes, key=_rank)]
    rows += one_sided
    if not rows and not as_json:
        print("no difference")
        return
    if not as_json:
        for row in rows:
            row["old"], row["new"] = _told_apart(row["old"], row["new"])
    console.table(rows, ["field", "old", "new"], as_json=as_json)


def _without_counterpart(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Take the results that only one of two runs has out of it, and return a row for each."""
    old, new = before["results"], after["results"]
    names = [name for name in {**old, **new} if not (old.get(name) and new.get(name))]
    pairs = [(name, old.pop(name, None), new.pop(name, None)) for name in names]
    return [
        {"field": f"results.{name}", "old": headline(was or {}) or "-", "new": headline(now or {}) or "-"}
        for name, was, now in pairs
        if was or now
    ]


def _equal(old: Any, new: Any) -> bool:
    """Tell whether two values are one number, written in two ways."""
    return _is_number(old) and _is_number(new) and old == new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rank(change: fingerprint.Change) -> tuple[int, str]:
    is_result = change.path.startswith("results.")
    if is_result and change.path.rpartition(".")[2] in HEADLINES:
        return 0, change.path
    return (2 if is_result else 1), change.path


def _told_apart(old: Any, new: Any) -> tuple[str, str]:
    """Return two different values as texts that differ: numbers with as many digits as that takes."""
    if _is_number(old) and _is_number(new):
        for digits in range(4, 17):
            texts = (f"{old:.{digits}g}", f"{new:.{digits}g}")
            if texts[0] != texts[1]:
                return texts
    texts = (_text(old), _text(new))
    return texts if texts[0] != texts[1] else (repr(old), repr(new))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _show_run(record: RunRecord, *, as_json: bool) -> None:
    """Print how far a run is, and its variants from the smallest to the largest."""
    variants = Runs(store().root).pareto(record.id)
    if as_json:
        print(json.dumps(record.model_dump() | {"status": record.state, "pareto": variants}, indent=1))
        return
    _show_status(record)
    if variants:
        tokens = variants[0].get("cache_tokens")
        counted = f" Sizes are with a cache of {tokens:,} tokens." if tokens else ""
        print(f"Variants by size; ratios are to the base model's bits per byte, baselines on validation text.{counted}")
        columns = ["variant", "method", "bits", "size", "ratio", "interval", "best", "baselines"]
        console.table([_variant_row(row) for row in variants], columns, as_json=False)


def _variant_row(row: dict[str, Any]) -> dict[str, Any]:
    bits = row.get("bits_per_cached_number") or row["bits_per_weight"]
    baselines = [(name, measured["ratio"]["value"]) for name, measured in row["baselines"].items()]
    measured = row["ratio"] is not None
    return {
        "variant": row["model"],
        "method": row["method"],
        "bits": f"{bits:.3g}{' cached' if row.get('bits_per_cached_number') else ''}" if bits else None,
        "size": quantity.size(round(row.get("footprint_bytes", row["size_bytes"]))),
        "ratio": f"{row['ratio']:.5f}" if measured else None,
        "interval": f"[{row['ratio_low']:.5f}, {row['ratio_high']:.5f}]" if measured else None,
        "best": "best" if row["best"] else "",
        "baselines": ", ".join(f"{name} {value:.5f}" for name, value in sorted(baselines, key=lambda pair: pair[1])),
    }


def _facts(found: RunRecord | Artifact) -> dict[str, Any]:
    """Return what is worth comparing: settings, inputs, results; never times or places."""
    if isinstance(found, RunRecord):
        results = {name: dict(node.summary) for name, node in found.nodes.items()}
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
        "took": quantity.duration(node.seconds),
        "result": headline(node.summary) or at_work,
    }


def _show_artifact(found: Artifact, *, as_json: bool) -> None:
    manifest = found.manifest
    if as_json:
        print(json.dumps(manifest.model_dump() | {"digest": found.digest, "path": found.place}, indent=1))
        return
    print(f"{manifest.node}  {found.place}")
    print(
        f"  fingerprint {manifest.fingerprint}\n  digest      {found.digest}\n  size        {quantity.size(found.size)}"
    )
    if manifest.provenance is not None:
        for key, value in manifest.provenance.model_dump().items():
            print(f"  {key:<15}{value}")
    print("lineage:")
    for line in _lineage(found, {stored.manifest.fingerprint: stored for stored in store().artifacts()}):
        print(f"  {line}")
    print("result:")
    for fact in fingerprint.explain({}, manifest.summary):  # dotted, so that no line holds a table
        print(f"  {fact.path:<40}  {json.dumps(fact.new)}")
    if manifest.stage == "prepare":
        _show_losses(found)
    print(f"files: {len(manifest.files)}")
    for name, record in list(manifest.files.items())[:20]:
        print(f"  {record.sha256[:12]}  {quantity.size(record.size):>9}  {name}")


def _show_losses(prepared: Artifact) -> None:
    """Print what preparing a corpus dropped and cut, by source and reason, and a sample of each reason."""
    from pipelines.data.report import losses

    if "report.json" not in prepared.manifest.files:
        return
    report = prepared.read_json("report.json")
    summary = prepared.manifest.summary
    table = losses(report, summary["train_bytes"] / max(summary["train_tokens"], 1))
    if not table:
        return
    print("lost, most bytes first (tokens at the bytes a token of the training text):")
    columns = ["source", "reason", "dropped", "cut", "bytes", "share", "tokens_about"]
    console.table([row | {"share": f"{row['share']:.2%}"} for row in table], columns, as_json=False)
    for reason, samples in report.get("samples", {}).items():
        print(f"  {reason}, as {samples[0]['id']}: {' '.join(samples[0]['text'].split())[:100]}")


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
