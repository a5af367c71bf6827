"""The tables of pages that come from the demo run: what they have to say, what they say, and putting it right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flows.commands.run import headline
from flows.run_record import RunRecord
from pipelines.core import quantity
from pipelines.core.errors import ConfigError
from pipelines.core.store import open_store
from pipelines.measure import intervals
from pipelines.report import axes

CHECKOUT = Path(__file__).resolve().parents[2]
README, RESULTS = CHECKOUT / "README.md", CHECKOUT / "docs" / "results" / "demo.md"
_STAGE_LINE = re.compile(r"^  (?P<node>[a-z]+(?:\.[\w-]+)?) +done +(?P<took>.*?)  +(?P<result>.*)$", re.MULTILINE)
_MEASURED = {"tokens_per_s", "prefill_ms_per_token", "decode_ms_per_token"}
"""Speeds: they belong to a machine, and stay as they are."""
_HEAD = "| model | bits per byte | ratio to the base model | KL, nats a token | folder |\n|---|---|---|---|---|\n"
_DATED = re.compile(r"(?<=Measured )\d{4}-\d\d-\d\d(?= with `make run`)")

Facts = dict[str, Any]


def facts_of(record: RunRecord, store: Path) -> Facts:
    """Return the numbers of a run that pages show."""
    evaluated = {
        name.partition(".")[2]: open_store(store).find("evaluate", node.fingerprint)
        for name, node in record.nodes.items()
        if node.stage == "evaluate"
    }
    missing = [name for name, found in evaluated.items() if found is None]
    if missing:
        raise ConfigError(f"the store lacks the evaluations of {', '.join(missing)}", hint="ingot run --recipe demo")
    rows = intervals.table({name: intervals.read(found.path) for name, found in evaluated.items() if found})
    kept = ("model", "bits_per_byte", "low", "high", "ratio", "ratio_low", "ratio_high", "kl", "size_bytes")
    return {
        "run": record.id,
        "date": record.started_at[:10],
        "summaries": {name: node.summary for name, node in record.nodes.items()},
        "models": [{key: row[key] for key in kept} for row in rows if row["kind"] != "baseline"],
    }


def differences(facts: Facts) -> list[str]:
    """Return what the pages say otherwise than the run."""
    return [
        f"{path.relative_to(CHECKOUT)} does not say what run {facts['run']} says"
        for path, text in _pages(facts).items()
        if text != path.read_text(encoding="utf-8")
    ]


def write(facts: Facts) -> None:
    """Put the pages right."""
    for path, text in _pages(facts).items():
        path.write_text(text, encoding="utf-8")


def _pages(facts: Facts) -> dict[Path, str]:
    """Return page -> its text with the numbers of the run."""
    readme = _STAGE_LINE.sub(lambda line: _stage_line(line, facts["summaries"]), README.read_text(encoding="utf-8"))
    bits = facts["summaries"]["promote"]["bits_per_byte"]
    readme = re.sub(r"(?<=: v1 \()[\d.]+(?= bits/byte\))", f"{bits:.3f}", readme)
    results = RESULTS.read_text(encoding="utf-8")
    start = results.index(_HEAD) + len(_HEAD)
    table = "".join(map(_model_line, facts["models"]))
    results = results[:start] + table + results[results.index("\n\n", start) + 1 :]
    return {README: readme, RESULTS: _DATED.sub(facts["date"], results, count=1)}


def _stage_line(line: re.Match[str], summaries: dict[str, Facts]) -> str:
    """Return a line of README's table as the run would print it; times and speeds stay as they are."""
    if line["node"] not in summaries:
        raise ConfigError(f"README.md shows {line['node']}, which the run does not have")
    said = dict(_pair(text) for text in line["result"].split(", "))
    now = dict(_pair(text) for text in headline(summaries[line["node"]]).split(", "))
    kept = {key: said.get(key, value) if key in _MEASURED else value for key, value in now.items()}
    return line[0][: -len(line["result"])] + ", ".join(f"{key} {value}" for key, value in kept.items())


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.rpartition(" ")
    return key, value


def _model_line(row: Facts) -> str:
    bits = f"{row['bits_per_byte']:.4f} [{row['low']:.3f}, {row['high']:.3f}]"
    ratio = kl = "-"
    if row["ratio"] is not None:
        low, high = row["ratio_low"], row["ratio_high"]
        ends = f"[{axes.ratio(low, row['ratio'], high)}, {axes.ratio(high, row['ratio'], low)}]"
        ratio, kl = f"{axes.ratio(row['ratio'], low, high)} {ends}", axes.number(row["kl"], 2)
    return f"| {row['model']} | {bits} | {ratio} | {kl} | {quantity.size(row['size_bytes'])} |\n"
