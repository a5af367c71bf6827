"""Draw the losses of one training: `python infra/pictures/curve.py METRICS.jsonl OUT.svg --title TEXT`.

`METRICS.jsonl` is the file of that name in an artifact of `pretrain`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

_SMOOTHED = 100
"""Steps that a point of the training's line is the mean of."""


def draw(metrics: Path, out: Path, title: str) -> None:
    """Write the picture: mean training losses and validation losses, nats a target, by millions of tokens."""
    mpl.rcParams["svg.hashsalt"] = "ingot"  # the same numbers make the same file
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    parts = [records[first : first + _SMOOTHED] for first in range(0, len(records), _SMOOTHED)]
    axes.plot(
        [part[-1]["tokens"] / 1e6 for part in parts],
        [sum(record["loss"] for record in part) / len(part) for part in parts],
        label=f"training, mean of {_SMOOTHED} steps",
    )
    validated = [record for record in records if "val/loss" in record]
    tokens, losses = ([record[key] for record in validated] for key in ("tokens", "val/loss"))
    axes.plot([count / 1e6 for count in tokens], losses, marker="o", label="validation")
    axes.set(xlabel="million tokens", ylabel="nats a target", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", default="")
    given = parser.parse_args()
    draw(given.metrics, given.out, given.title)
