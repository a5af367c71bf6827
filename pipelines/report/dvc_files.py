"""The headline numbers and the loss curve of a run, in the two files that `dvc metrics` and `dvc plots` read.

They lie in the project, to be committed with the recipe that made them: then `dvc metrics diff REVISION` and
`dvc plots diff REVISION` compare revisions. Numbers that differ from run to run of the same recipe are left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.core.artifact import Artifact, write_text
from pipelines.report.sections import metrics

METRICS, CURVE = "metrics.json", "training.csv"
_TIMED = ("tokens_per_s",)
_STAGES = ("prepare", "pretrain", "compress", "evaluate", "compare")


def write(artifacts: Mapping[str, Artifact], folder: Path) -> None:
    """Write both files; one that stands as it is to be is left alone.

    Args:
        artifacts: node name -> artifact of a finished run.
        folder: where they go; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        name: _numbers(made.manifest.summary) for name, made in artifacts.items() if name.partition(".")[0] in _STAGES
    }
    _write(folder / METRICS, json.dumps(numbers, indent=1) + "\n")
    if "pretrain" in artifacts:
        _write(folder / CURVE, _curve(artifacts["pretrain"]))


def _numbers(summary: Mapping[str, Any]) -> dict[str, int | float]:
    known = {key: value for key, value in summary.items() if key not in _TIMED and not isinstance(value, bool)}
    return {key: value for key, value in known.items() if isinstance(value, int | float)}


def _curve(trained: Artifact) -> str:
    """Return step, tokens, loss and validation loss of every record; the last is empty where nothing was validated."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("step", "tokens", "loss", "validation_loss"))
    rows.writerows((row["step"], row.get("tokens"), row.get("loss"), row.get("val/loss")) for row in metrics(trained))
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
