"""The report of a run: one self-contained HTML page from the run record and its artifacts.

No script and no request: style and drawings are inside, and the page's own policy forbids everything else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from pipelines.core import quantity
from pipelines.core.artifact import Artifact, write_text
from pipelines.core.redaction import redact
from pipelines.measure import intervals
from pipelines.report import axes, compression, sections

_TEMPLATE = "report.html.j2"


def write(
    run_record: dict[str, Any],
    artifacts: Mapping[str, Artifact],
    path: Path,
    earlier: Mapping[str, Artifact] | None = None,
) -> None:
    """Write the report of a run; a reader sees the old page or the new one.

    Args:
        run_record: what `RunRecord.model_dump()` returns.
        artifacts: node name -> artifact; what a run did not reach is missing, and the page says so.
        path: the HTML file; its folder exists.
        earlier: pretraining of earlier runs, by what they are to this one, whose curves stand beside its own.
    """
    write_text(path, _environment().get_template(_TEMPLATE).render(sections.page(run_record, artifacts, earlier)))


def write_pareto(run_record: Mapping[str, Any], artifacts: Mapping[str, Artifact], path: Path) -> bool:
    """Write the variants of a run by method and bits as JSON rows; return whether there are any."""
    evaluations = {
        name.removeprefix("evaluate."): intervals.read(artifact.path)
        for name, artifact in artifacts.items()
        if name.startswith("evaluate.")
    }
    tokens = compression.counted_tokens(run_record, artifacts)
    variants = compression.rows(intervals.table(evaluations), artifacts, tokens)
    if variants:
        write_text(path, json.dumps(variants, indent=1) + "\n")
    return bool(variants)


def _without_secrets(value: Any) -> Any:
    """Return what the page shows of a value; called before it is escaped, which would hide a secret from us."""
    return type(value)(redact(value)) if isinstance(value, str) else value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_without_secrets,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = {
        "number": axes.number,
        "short": functools.partial(quantity.short, none=axes.NONE),
        "size": functools.partial(quantity.size, none=axes.NONE),
        "duration": functools.partial(quantity.duration, none=axes.NONE),
        "ratio": axes.ratio,
    }
    environment.filters.update(texts)
    return environment
