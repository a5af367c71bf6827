"""Every stage by name. Stages are described here without importing them: planning needs neither torch nor MLflow."""

from __future__ import annotations

from pipelines.core.stage import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare",
            version=5,
            entry="pipelines.data.stage:run",
            observations=("report.json", "quarantine.jsonl"),
            settings="pipelines.data.config:PrepareJob",
            estimate="pipelines.data.estimate:estimate_prepare",
            corpus="reads",
        ),
        Stage(
            "fetch",
            version=2,
            entry="pipelines.registry.fetch:run",
            settings="pipelines.registry.config:FetchConfig",
            corpus="none",
        ),
        Stage(
            "pretrain",
            version=4,
            entry="pipelines.training.stage:run",
            observations=("metrics.jsonl", "observations.json", "samples.jsonl"),
            journals=("*.jsonl", "rollbacks.json"),
            settings="pipelines.training.config:PretrainConfig",
            estimate="pipelines.training.estimate:estimate_pretrain",
        ),
        Stage(
            "compress",
            version=9,
            entry="pipelines.compression.stage:run",
            observations=("observations.json", "metrics.jsonl"),
            journals=("*.jsonl", "rollbacks.json"),
            settings="pipelines.compression.config:CompressConfig",
            estimate="pipelines.compression.estimate:estimate_compress",
        ),
        Stage(
            "evaluate",
            version=6,
            entry="pipelines.evaluation.stage:run",
            observations=("observations.json",),
            settings="pipelines.evaluation.config:EvaluateConfig",
            estimate="pipelines.evaluation.estimate:estimate_evaluate",
        ),
        Stage(
            "promote",
            version=5,
            entry="pipelines.registry.stage:run",
            observations=("observations.json", "decision.json", "model_card.md"),
            settings="pipelines.registry.config:PromoteConfig",
            needs_tracking=True,
            preview="pipelines.registry.evidence:preview",
        ),
    )
}
