"""A finished run of small numbers: real artifacts in the layouts of the stages, and the record that belongs to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import report
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.provenance import Provenance

NODES = ("prepare", "pretrain", "evaluate.pretrain", "compress.<b>int4", "evaluate.<b>int4", "promote")
MADE = Provenance(
    created_at="2026-01-02T03:04:05+00:00",
    duration_s=1.0,
    git_commit="c0ffee" * 6 + "+dirty",
    source_digest="5" * 64,
    user="ada",
    host="engine",
    python="3.11.7 linux",
    data_hash="abcdef0123456789.dir",
)
CHECK = {"name": "bytes / base", "found": "0.250", "required": "at most 1", "passed": True}


def evaluation(bits: float, size: int, ratio: float | None, baselines: dict[str, float]) -> dict[str, Any]:
    """Return what the evaluate stage writes, with an interval of a tenth to both sides."""
    versus = None
    if ratio is not None:
        interval = {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
        versus = {"bits_per_byte_ratio": interval, "kl_nats_per_token": 0.0123}
    return {
        "bits_per_byte": {"value": bits, "low": bits - 0.1, "high": bits + 0.1},
        "documents": 24,
        "documents_total": 80,
        "truncated": True,
        "confidence": 0.95,
        "tasks": {"cloze": {"accuracy": 0.375, "stderr": 0.1, "n": 8, "chance": 0.25}},
        "size_bytes": size,
        "family": "decoder",
        "baselines": baselines,
        "harness": "lm-eval 0.4",
        "versus_base": versus,
    }


def payloads() -> dict[str, dict[str, Any]]:
    """Return node -> file name -> JSON content."""
    metrics = [
        {"step": s, "loss": 7.0 - s / 10, "lr": s / 100, "grad_norm": 1.0, "tokens_per_s": 900.0, "trust/layer.0": 0.1}
        for s in range(1, 6)
    ]
    metrics[-1]["val/loss"] = 6.6
    latency = {"prefill_ms_per_token": 2.5, "decode_ms_per_token": 12.5, "peak_memory_bytes": 4_000_000}
    seen = {"latency": latency}
    source = {"read": 100, "kept": 91, "dropped": {"too short": 7, "near duplicate": 2}, "read_bytes": 5000}
    source |= {"dropped_bytes": {"too short": 350, "near duplicate": 400}}
    parts = {"letters & <poems>": {"documents": 30, "bytes": 1000}}
    return {
        "prepare": {
            "report.json": {
                "sources": {"letters & <poems>": source},
                "splits": dict.fromkeys(("train", "validation", "test"), parts),
                "duplicates": {"exact": 3, "near": 2},
                "quarantined": 4,
                "contamination": {"splits": {"test": {"share": 0.0123456}}},
            }
        },
        "pretrain": {
            "metrics.jsonl": metrics,
            "training.json": {
                "steps": 5,
                "tokens": 20480,
                "parameters": 266816,
                "losses": ["0x1p+2"],
                "bits_per_byte": None,
            },
            "observations.json": {"tokens_per_s": 900.0, "mfu": 0.02, "seconds": {"forward": 1.5}, "resumed_at": [3]},
        },
        "evaluate.pretrain": {
            "evaluation.json": evaluation(2.0, 4_000_000, None, {"gzip": 3.125}),
            "observations.json": seen,
        },
        "compress.<b>int4": {
            "compression.json": {
                "format": 1,
                "method": "rtn",
                "parameters": {},
                "layout": "compressed-tensors",
                "loads_with": "transformers",
                "totals": {"layers": 1, "bytes": 10, "base_bytes": 40, "ratio": 4.0},
                "layers": {},
            }
        },
        "evaluate.<b>int4": {"evaluation.json": evaluation(2.1, 1_000_000, 1.05, {}), "observations.json": seen},
        "promote": {
            "decision.json": {
                "accepted": True,
                "broken": [],
                "candidate": "<b>int4",
                "checks": [CHECK],
                "passed_over": ["int2 (9 bytes): accuracy lost, cloze"],
                "rule": "first champion: nobody to beat",
                "versus_champion": None,
            }
        },
    }


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, Artifact]:
    """The artifacts of the run by node name."""
    return {node: publish(tmp_path, node, files) for node, files in payloads().items()}


def publish(root: Path, node: str, files: dict[str, Any]) -> Artifact:
    """Publish an artifact of a node with these files, file name -> JSON content or rows."""
    stage = node.partition(".")[0]
    build = root / f"build-{len(list(root.iterdir()))}"
    build.mkdir()
    for name, content in files.items():
        rows = content if isinstance(content, list) else [content]
        (build / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return artifact.publish(
        build,
        root / build.name.replace("build", "final"),
        stage=stage,
        node=node,
        identity={"node": node},
        parents={},
        summary={"model": "ingot-demo", "version": "7"} if stage == "promote" else {},
        provenance=MADE,
    )


@pytest.fixture
def record() -> dict[str, Any]:
    """The run record as the flow hands it over."""
    entry = {"state": "done", "seconds": 12.5, "summary": {}}
    return {
        "id": "20260102-030405-demo",
        "recipe": "demo",
        "overrides": ["pretrain.steps=5"],
        "config": {
            "pretrain": {"steps": 5, "optimizer": {"betas": [0.9, 0.95]}},
            "compress": [{"name": "<b>int4", "method": "rtn", "from": ""}],
            "promote": {"model_name": "ingot-demo"},
            "tracking": {"password": "hunter2hunter2"},
        },
        "data_hash": "abcdef0123456789.dir",
        "status": "done",
        "started_at": "2026-01-02T03:04:05+00:00",
        "finished_at": None,
        "error": None,
        "host": "engine",
        "nodes": {n: {**entry, "stage": n.partition(".")[0], "fingerprint": f"{i}" * 64} for i, n in enumerate(NODES)},
        "tracking_url": None,
    }


@pytest.fixture
def render(tmp_path: Path) -> Callable[[dict[str, Any], dict[str, Artifact]], str]:
    """Write the report and return its text."""

    def write(record: dict[str, Any], artifacts: dict[str, Artifact]) -> str:
        path = tmp_path / "report.html"
        report.write(record, artifacts, path)
        return path.read_text(encoding="utf-8")

    return write
