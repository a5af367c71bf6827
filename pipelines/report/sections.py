"""The facts of each section of the report, from the run record and the artifacts; the template only lays them out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.core import quantity
from pipelines.core.artifact import Artifact
from pipelines.core.redaction import redact_value
from pipelines.core.stage import BASES, base_name
from pipelines.data.report import losses
from pipelines.measure import answers, intervals
from pipelines.modelio import load_instructions
from pipelines.report import charts, compression, lineage, optimizers, pareto
from pipelines.report.charts import Axis, Series

Facts = dict[str, Any]
_EVALUATE = "evaluate."
_SAMPLES = answers.FILE
_BLANK_LINES = re.compile(r"\n(\s*\n){2,}")
_TRAINING_SAMPLES = 6
"""Shown at most."""
_LOST = 30
"""Rows of what the corpus lost, at most, by source and reason."""
_EXPORTED = "/tmp/champion"  # noqa: S108 - shown, not used


def page(
    record: Mapping[str, Any], artifacts: Mapping[str, Artifact], earlier: Mapping[str, Artifact] | None = None
) -> Facts:
    """Return everything that the template shows; a section that the run did not reach is None.

    Args:
        record: what `RunRecord.model_dump()` returns.
        artifacts: node name -> artifact.
        earlier: what an earlier run is to this one -> its pretraining.
    """
    evaluations = _evaluations(artifacts)
    gate = _gate(record, artifacts.get("promote"))
    rows, tokens = intervals.table(evaluations), compression.counted_tokens(record, artifacts)
    return {
        "run": record,
        "headline": _headline(record, rows, gate),
        "training": training(artifacts.get("pretrain"), earlier or {}),
        "optimizers": _optimizers(record, artifacts),
        "samples": samples(evaluations, artifacts, gate["candidate"]),
        "loading": _loading(artifacts, evaluations, gate),
        "time": _stage_times(record),
        "data": data(artifacts.get("prepare")),
        "evaluation": _evaluation(rows, evaluations, gate["candidate"], tokens),
        "compression": _compression(rows, artifacts, gate["candidate"], tokens),
        "gate": gate,
        "lineage": {"picture": lineage.draw(record, artifacts), "rows": _lineage_rows(record, artifacts)},
        "config": list(flatten(record.get("config") or {})),
        "environment": _environment(record, artifacts),
    }


# ---- headline and gate ------------------------------------------------------------------------------------------


def _headline(record: Mapping[str, Any], rows: list[Facts], gate: Facts) -> Facts:
    """Return the decision in a sentence, and the few numbers that a reader came for."""
    models = [row for row in rows if row["kind"] != "baseline"]
    base = next((row for row in models if row["model"] in BASES), None)
    variants = sorted((row for row in models if row is not base), key=lambda row: row["size_bytes"])
    shown = next((row for row in models if row["model"] == gate["candidate"]), None)
    shown = shown or (variants[0] if variants else base)
    saved = None
    if shown and base and shown is not base and base["size_bytes"]:
        saved = 1.0 - shown["size_bytes"] / base["size_bytes"]
    seconds = [entry["seconds"] for entry in record["nodes"].values() if entry.get("seconds")]
    return {
        "sentence": _sentence(record, gate),
        "model": shown,
        "base": base,
        "saved": saved,
        "seconds": sum(seconds) if seconds else None,
    }


def _sentence(record: Mapping[str, Any], gate: Facts) -> str:
    if gate["accepted"]:
        return f"{gate['candidate']} is champion: {gate['model']} version {gate['version']} ({gate['rule']})."
    if record["status"] == "refused":
        return "The gate refused: no new champion, and the one before stays."
    if record["status"] == "failed":
        return "The run failed before it could decide."
    if record["status"] == "preempted":
        return "The run was stopped; `ingot resume` goes on where it left off."
    return "The run has not decided on a champion yet."


def _gate(record: Mapping[str, Any], artifact: Artifact | None) -> Facts:
    """Return the decision: from decision.json, or from the run's error where the gate refused."""
    decision = _read(artifact, "decision.json") or {}
    summary = artifact.manifest.summary if artifact else {}
    model = ((record.get("config") or {}).get("promote") or {}).get("model_name", "")
    return {
        "accepted": decision.get("accepted", False),
        "candidate": decision.get("candidate"),
        "model": summary.get("model", model),
        "version": summary.get("version", "?"),
        "rule": decision.get("rule", ""),
        "checks": decision.get("checks", []),
        "broken": decision.get("broken", []),
        "passed_over": decision.get("passed_over", []),
        "versus_champion": decision.get("versus_champion"),
        "reached": bool(decision),
    }


# ---- training ---------------------------------------------------------------------------------------------------


_SAID = {"bits_per_byte": "validation_bits_per_byte"}
"""Fact of training.json -> its name on the page, where `bits_per_byte` alone is that of the test split."""


def training(artifact: Artifact | None, earlier: Mapping[str, Artifact] | None = None) -> Facts | None:
    """Return the curves and facts of pretraining, beside those of earlier runs; None without its artifact."""
    if artifact is None:
        return None
    rows = metrics(artifact)
    observed = _read(artifact, "observations.json") or {}
    seconds = sorted((observed.get("seconds") or {}).items(), key=lambda item: -item[1])
    facts = _read(artifact, "training.json") or dict(artifact.manifest.summary)
    steps = Axis("optimizer step")
    return {
        # An encoder has no bits per byte of its own kind, so that fact is None: left out like the lists.
        "facts": {
            _SAID.get(name, name): v for name, v in facts.items() if v is not None and not isinstance(v, list | dict)
        },
        "observed": observed,
        "loss": charts.lines(_losses(rows), steps, Axis("loss, nats per token"), "Loss over steps"),
        "beside": _beside(artifact, rows, earlier or {}),
        "rate": _line(rows, "lr", steps, Axis("learning rate", zero=True), "Learning rate over steps"),
        "norm": _line(
            rows, "grad_norm", steps, Axis("gradient norm", log=True), "Gradient norm over steps", noisy=True
        ),
        "trust": _trust(rows, steps),
        "speed": _line(
            rows, "tokens_per_s", steps, Axis("tokens per second", zero=True), "Throughput over steps", noisy=True
        ),
        "split": charts.bars(seconds, "Seconds of training by part", quantity.duration) if seconds else "",
        "samples": _training_samples(artifact),
    }


def metrics(artifact: Artifact) -> list[Facts]:
    """Return the rows of metrics.jsonl by step; of a step that was repeated after a resume the last one counts."""
    by_step = {row["step"]: row for row in _rows(artifact, "metrics.jsonl")}
    return [by_step[step] for step in sorted(by_step)]


def _rows(artifact: Artifact, name: str) -> list[Facts]:
    """Return the rows of a JSON Lines file; none where there is no file."""
    path = artifact.path / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def _training_samples(artifact: Artifact) -> list[Facts]:
    """Return what the model made of a validation text as it learned: the first sample, the last, a few between."""
    rows = _rows(artifact, "samples.jsonl")
    last, shown = len(rows) - 1, min(len(rows), _TRAINING_SAMPLES)
    picked = [rows[round(number * last / max(shown - 1, 1))] for number in range(shown)]
    return [row | {"text": _written(row["text"])} for row in picked]


def _written(text: str) -> str:
    """Return what a model wrote, as the page shows it: one that says nothing but line ends fills no screen."""
    return _BLANK_LINES.sub("\n\n", text)


def _losses(rows: list[Facts]) -> list[Series]:
    raw = _series(rows, "loss", "").points
    curves = [Series("training, running mean" if len(raw) >= 60 else "training", charts.smooth(raw), raw=raw)]
    if any("val/loss" in row for row in rows):
        seen = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
        curves.append(Series("validation", seen, markers=True))
    return curves


def _beside(own: Artifact, rows: list[Facts], earlier: Mapping[str, Artifact]) -> str:
    """Return the smoothed losses of this run and of earlier ones by tokens, the one axis that all of them share."""
    if not earlier:
        return ""
    curves = [_by_tokens(rows, "this run")]
    for name, artifact in earlier.items():
        same = artifact.manifest.parents.get("prepare") == own.manifest.parents.get("prepare")
        curves.append(_by_tokens(metrics(artifact), name if same else f"{name}, on other tokens"))
    return charts.lines(
        curves, Axis("tokens", text=quantity.short), Axis("loss, nats per token"), "Loss by tokens, beside earlier runs"
    )


def _optimizers(record: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> Facts | None:
    names = ["pretrain", *(f"pretrain.{each['name']}" for each in (record.get("config") or {}).get("baselines") or [])]
    curves = [
        _by_tokens(metrics(artifacts[name]), name.rpartition(".")[2] if "." in name else "this model")
        for name in names
        if name in artifacts
    ]
    return optimizers.compared(record, artifacts, curves)


def _by_tokens(rows: list[Facts], name: str) -> Series:
    return Series(name, charts.smooth([(row["tokens"], row.get("loss")) for row in rows if "tokens" in row]))


def _line(rows: list[Facts], key: str, x: Axis, y: Axis, title: str, *, noisy: bool = False) -> str:
    if not any(key in row for row in rows):
        return ""
    raw = _series(rows, key, key).points
    return charts.lines([Series(key, charts.smooth(raw), raw=raw) if noisy else Series(key, raw)], x, y, title)


def _trust(rows: list[Facts], x: Axis) -> str:
    """Return LAMB's trust ratios by layer group; of many groups a spread of those that the colours can tell apart."""
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("trust/")))
    if not names:
        return ""
    if len(names) > charts.COLOURS:
        last = charts.COLOURS - 1
        names = [names[round(i * (len(names) - 1) / last)] for i in range(charts.COLOURS)]
    curves = [Series(name.removeprefix("trust/"), charts.smooth(_series(rows, name, "").points)) for name in names]
    return charts.lines(curves, x, Axis("trust ratio ‖w‖ / ‖update‖", log=True), "Trust ratios over steps")


def _series(rows: list[Facts], key: str, name: str) -> Series:
    return Series(name, [(row["step"], row.get(key)) for row in rows])


def _stage_times(record: Mapping[str, Any]) -> str:
    rows = [(name, entry["seconds"]) for name, entry in record["nodes"].items() if entry.get("seconds") is not None]
    return charts.bars(rows, "Seconds by node of the run", quantity.duration) if rows else ""


# ---- data -------------------------------------------------------------------------------------------------------


def data(artifact: Artifact | None) -> Facts | None:
    """Return the documents read, kept and dropped by source and reason, and the splits; None without the artifact."""
    report = _read(artifact, "report.json")
    if artifact is None or report is None:
        return None
    reasons = sorted({reason for source in report["sources"].values() for reason in source["dropped"]})
    sources = [
        {"name": name, **source, "reasons": [source["dropped"].get(reason, 0) for reason in reasons]}
        for name, source in report["sources"].items()
    ]
    total = {
        "name": "all",
        "read": sum(s["read"] for s in sources),
        "kept": sum(s["kept"] for s in sources),
        "reasons": [sum(s["reasons"][i] for s in sources) for i in range(len(reasons))],
    }
    index = _read(artifact, "index.json") or {}
    return {
        "reasons": reasons,
        "sources": sources,
        "total": total,
        "lost": losses(report, _bytes_per_token(index))[:_LOST],
        "splits": _splits(report, index),
        "duplicates": report.get("duplicates") or {},
        "quarantined": report.get("quarantined", 0),
        "index": index,
    }


def _bytes_per_token(index: Facts) -> float | None:
    train = (index.get("splits") or {}).get("train") or {}
    return train["bytes"] / train["tokens"] if train.get("bytes") and train.get("tokens") else None


def _splits(report: Facts, index: Facts) -> list[Facts]:
    rows, shared = [], (report.get("contamination") or {}).get("splits") or {}
    for name in ("train", "validation", "test"):
        parts = (report.get("splits") or {}).get(name, {})
        written = (index.get("splits") or {}).get(name, {})
        rows.append(
            {
                "name": name,
                "documents": sum(part["documents"] for part in parts.values()),
                "bytes": sum(part["bytes"] for part in parts.values()),
                "sequences": written.get("sequences"),
                "tokens": written.get("tokens"),
                "groups": (report.get("groups") or {}).get(name),
                "shared": (shared.get(name) or {}).get("share"),
            }
        )
    return rows


# ---- evaluation -------------------------------------------------------------------------------------------------


def _evaluations(artifacts: Mapping[str, Artifact]) -> dict[str, Facts]:
    """Return name -> evaluation, the base first."""
    evaluations = {
        name.removeprefix(_EVALUATE): intervals.read(artifact.path)
        for name, artifact in artifacts.items()
        if name.startswith(_EVALUATE)
    }
    return dict(sorted(evaluations.items(), key=lambda item: item[0] not in BASES))


def _evaluation(
    rows: list[Facts], evaluations: Mapping[str, Facts], candidate: str | None, cache_tokens: int
) -> Facts | None:
    if not evaluations:
        return None
    first = next(iter(evaluations.values()))
    models = [
        pareto.Model(
            row["model"],
            compression.footprint(row, cache_tokens),
            row["bits_per_byte"],
            row["low"],
            row["high"],
            row["model"] == candidate,
        )
        for row in rows
        if row["kind"] != "baseline"
    ]
    levels = [(row["model"], row["bits_per_byte"]) for row in rows if row["kind"] == "baseline"]
    x = compression.size_axis(cache_tokens)
    return {
        "rows": rows,
        "tasks": [key.removeprefix("task.") for key in rows[0] if key.startswith("task.")],
        "chance": {name: task.get("chance") for name, task in first["tasks"].items()},
        "uninformative": [name for name, task in first["tasks"].items() if not task.get("informative", True)],
        "first": first,
        "candidate": candidate,
        "pareto": pareto.draw(models, levels, x, Axis("bits per byte"), "Size against bits per byte"),
    }


def samples(evaluations: Mapping[str, Facts], artifacts: Mapping[str, Artifact], candidate: str | None) -> list[Facts]:
    """Return what the base and the candidate (else the last variant) write at the same prompts; empty without texts."""
    written = {name: found for name in evaluations if (found := _read(artifacts.get(_EVALUATE + name), _SAMPLES))}
    last = candidate if candidate in written else next(reversed(written), None)
    names = list(dict.fromkeys(name for name in (base_name(written), last) if name in written))
    rows: dict[str, list[Facts]] = {}
    for name in names:
        for row in written[name]:
            rows.setdefault(row["prompt"], []).append({"model": name, "text": _written("\n".join(answers.lines(row)))})
    return [{"prompt": prompt, "texts": texts} for prompt, texts in rows.items()]


def _loading(artifacts: Mapping[str, Artifact], evaluations: Mapping[str, Facts], gate: Facts) -> Facts | None:
    """Return how the champion of this run is loaded; None where it made none."""
    name = gate["candidate"]
    model = artifacts.get(str(name) if name in BASES else f"compress.{name}")
    if not gate["accepted"] or model is None or name not in evaluations:
        return None
    how = load_instructions.of(model)
    return {
        "sentence": how.sentence,
        "snippet": how.snippet(load_instructions.LOADER[evaluations[name]["family"]], _EXPORTED),
        "exported": _EXPORTED,
        "uri": f"models:/{gate['model']}@champion",
    }


def _compression(
    rows: list[Facts], artifacts: Mapping[str, Artifact], candidate: str | None, cache_tokens: int
) -> Facts | None:
    """Return the variants by method and bits; None where none was measured."""
    variants = compression.rows(rows, artifacts, cache_tokens)
    return {"rows": variants, "picture": compression.picture(variants, candidate)} if variants else None


# ---- lineage, configuration, environment ------------------------------------------------------------------------


def _lineage_rows(record: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> list[Facts]:
    rows = []
    for name, entry in record["nodes"].items():
        artifact = artifacts.get(name)
        provenance = artifact.manifest.provenance if artifact else None
        rows.append(
            {
                "name": name,
                "state": entry["state"],
                "seconds": entry.get("seconds"),
                "fingerprint": entry["fingerprint"],
                "digest": artifact.digest if artifact else None,
                "size": artifact.size if artifact else None,
                "commit": provenance.git_commit if provenance else None,
                "created": provenance.created_at if provenance else None,
            }
        )
    return rows


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, JSON value) of every setting, secrets blanked."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            name = item.get("name", index) if isinstance(item, Mapping) else index
            yield from flatten(item, f"{prefix}[{name}]")
    else:
        shown = redact_value(prefix.rpartition(".")[2], value)
        yield prefix, shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)


def _environment(record: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> list[tuple[str, str]]:
    """Return what the artifacts were made with; several values where they were not all made in one place."""
    origins = [a.manifest.provenance for a in artifacts.values() if a.manifest.provenance]
    observed = _read(artifacts.get("pretrain"), "observations.json") or {}
    first = next((e for e in _evaluations(artifacts).values()), {})
    facts = {
        "host of the run": record.get("host"),
        "hosts of the artifacts": _distinct(p.host for p in origins),
        "Python": _distinct(p.python for p in origins),
        "git commits": _distinct(p.git_commit for p in origins),
        "training device": observed.get("device"),
        "training threads per rank": observed.get("threads_per_rank"),
        "peak arithmetic rate": observed.get("peak_source"),
        "evaluation harness": first.get("harness"),
        "started": record.get("started_at"),
        "finished": record.get("finished_at"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _distinct(values: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _read(artifact: Artifact | None, name: str) -> Any:
    return artifact.read_json(name) if artifact and (artifact.path / name).exists() else None
