"""The evaluate stage: held-out bits per byte, tasks, size, probes, and a variant against its base model.

evaluation.json        the numbers; the same inputs give the same bytes
document_nats.npy      negative log likelihood of each document, for paired comparison with any other model
document_bytes.npy     bytes of each document (of its masked tokens for an encoder)
task_outcomes.json     0 or 1 for each item of each task, for paired comparison
tasks/                 the tasks as lm-eval reads them
PROBE.npy              what a probe keeps for later comparisons, as `relative.npy`
PROBE.json             what a probe keeps for people to read, as `samples.json`
observations.json      latency, memory and time: not part of the result
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from models.architectures.config import Family
from pipelines.core.artifact import Artifact
from pipelines.core.compute import resolve_device
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.evaluation import baselines, probe, tasks
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.probe import Subject
from pipelines.measure import batches, heldout, intervals, scoring, windows
from pipelines.measure.batches import EvaluationBatches, plan_batches, window_tokens
from pipelines.measure.heldout import Heldout
from pipelines.measure.scoring import Scorer

Json = dict[str, Any]


def run(config: EvaluateConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Measure the model of `inputs["model"]` on the test documents of `inputs["prepare"]`.

    With `base_model` and `base_evaluation` among the inputs the model is a variant, and is compared with its base.

    Raises:
        IntegrityError: the model does not load, or has another tokenizer than the prepared data.
        NumericError: the model gives numbers that are not finite.
    """
    started = time.monotonic()
    prepared, model = inputs["prepare"].path, inputs["model"].path / "model"
    heldout.check_tokenizer(prepared, model)
    documents = heldout.load(prepared, config.max_documents)
    scorer = scoring.load(model, resolve_device(context.compute.device))
    planned = plan_batches(config, documents, scorer.family, prepared)

    def report(done: int, total: int) -> None:
        context.report(Progress(context.node, done, total, "tokens", "held-out documents"))

    nats = scoring.document_nats(scorer, planned.batches, len(documents.documents), report)
    evaluation = _headline(config, documents, scorer, planned, nats, model)
    if "base_model" not in inputs:
        evaluation |= _baselines(config, prepared, documents, scorer.family, planned)
    rows, outcomes = _run_tasks(config, documents, scorer, model, out_dir, context)
    evaluation |= rows
    if "base_model" in inputs:
        evaluation["versus_base"] = _versus_base(config, inputs, scorer, planned, nats, outcomes)
    subject = Subject(
        scorer=scorer,
        folder=model,
        documents=documents,
        window=window_tokens(config, documents),
        bootstrap=_bootstrap(config),
        base=inputs.get("base_evaluation"),
    )
    observations = _run_probes(config, subject, out_dir, context, evaluation)
    np.save(out_dir / "document_nats.npy", nats, allow_pickle=False)
    np.save(out_dir / "document_bytes.npy", planned.sizes, allow_pickle=False)
    _write(out_dir / "evaluation.json", evaluation)
    _write(out_dir / "task_outcomes.json", outcomes)
    _write(out_dir / "observations.json", observations | {"wall_s": round(time.monotonic() - started, 3)})
    return _summary(evaluation, observations)


# ---- parts of evaluation.json -----------------------------------------------------------------------------------


def _headline(
    config: EvaluateConfig,
    documents: Heldout,
    scorer: Scorer,
    planned: EvaluationBatches,
    nats: NDArray[np.float64],
    model: Path,
) -> Json:
    return {
        "format": 3,
        "family": scorer.family,
        "settings": {
            **batches.description(config, documents, scorer.family),
            "documents": documents.digest,
            "batch_tokens": config.batch_tokens,
            "max_documents": config.max_documents,
        },
        "bits_per_byte": intervals.bits_per_byte(nats, planned.sizes, **_bootstrap(config)).to_json(),
        "bits_per_token": float(nats.sum()) / (planned.scored * math.log(2.0)),
        "scored_tokens": planned.scored,
        "scored_bytes": int(planned.sizes.sum()),
        "documents": len(documents.documents),
        "documents_total": documents.total,
        "truncated": documents.truncated,
        "confidence": config.confidence,
        "size_bytes": _bytes_of(model, "*"),
        "weights_bytes": _bytes_of(model, "*.safetensors"),
        "cache_bytes_per_token": scoring.cache_bytes_per_token(scorer, planned.batches[0]),
        "baselines": {},
        "versus_base": None,
    }


def _baselines(
    config: EvaluateConfig, prepared: Path, documents: Heldout, family: Family, planned: EvaluationBatches
) -> Json:
    if family == "decoder":
        bits = baselines.for_decoder(config, prepared, documents)
    else:
        bits = baselines.for_encoder(config, prepared, documents, planned.masked, int(planned.sizes.sum()))
    train_tokens = int(documents.index["splits"]["train"]["tokens"])
    return {
        "baselines": bits,
        "baseline_train_tokens": min(train_tokens, config.baseline_tokens),
        "baselines_truncated": train_tokens > config.baseline_tokens,
    }


def _run_tasks(
    config: EvaluateConfig, documents: Heldout, scorer: Scorer, model: Path, out_dir: Path, context: StageContext
) -> tuple[Json, dict[str, list[int]]]:
    """Generate, write and run the tasks; return their part of evaluation.json and the outcome of every item."""
    generated, skipped = tasks.generate(config.tasks, documents.documents, scorer.family)
    if not generated and not config.tasks.lm_eval:
        return {"tasks": {}, "skipped_tasks": skipped, "harness": None}, {}
    # lm-eval takes seconds to import: only a run with tasks pays for it.
    from pipelines.evaluation import harness

    tasks.write(generated, out_dir / "tasks")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    outcomes = harness.run(
        scorer,
        tokenizer,
        generated,
        folder=out_dir / "tasks",
        cache=context.scratch / "datasets",
        batch_size=config.tasks.batch_size,
    )
    named, refused = harness.run_named(
        scorer, tokenizer, config.tasks.lm_eval, scratch=context.scratch / "tasks", batch_size=config.tasks.batch_size
    )
    outcomes |= named
    rows = {name: outcome.to_json(config.confidence) for name, outcome in outcomes.items()}
    part = {"tasks": rows, "skipped_tasks": skipped | refused, "harness": f"lm-eval {harness.VERSION}"}
    return part, {name: list(outcome.correct) for name, outcome in outcomes.items()}


def _versus_base(
    config: EvaluateConfig,
    inputs: Mapping[str, Artifact],
    scorer: Scorer,
    planned: EvaluationBatches,
    nats: NDArray[np.float64],
    outcomes: dict[str, list[int]],
) -> Json:
    evaluated, options = inputs["base_evaluation"], _bootstrap(config)
    base_nats = np.load(evaluated.path / "document_nats.npy", allow_pickle=False)
    base_outcomes = evaluated.read_json("task_outcomes.json")
    base_size = evaluated.read_json("evaluation.json")["size_bytes"]
    model = inputs["model"].path / "model"
    result: Json = {
        "bits_per_byte_ratio": intervals.paired_ratio(nats, base_nats, planned.sizes, **options).to_json(),
        "size_ratio": _bytes_of(model, "*") / base_size,
        "task_accuracy_difference": {
            name: intervals.paired_difference(correct, base_outcomes[name], **options).to_json()
            for name, correct in outcomes.items()
            if name in base_outcomes
        },
    }
    if config.kl_tokens:
        base = scoring.load(inputs["base_model"].path / "model", scorer.device)
        result |= scoring.divergence(base, scorer, windows.take(planned.batches, config.kl_tokens))
    return result


def _run_probes(
    config: EvaluateConfig, subject: Subject, out_dir: Path, context: StageContext, evaluation: Json
) -> Json:
    """Run every probe that is switched on; enter its results into `evaluation`, and return the observations."""
    evaluation |= {"probes": {}, "skipped_probes": {}}
    observations: Json = {}
    chosen = {name: settings for name, settings in config.probes.items() if settings.enabled}
    for number, (name, settings) in enumerate(chosen.items()):
        member = probe.get(name)
        if reason := member.refusal(subject):
            evaluation["skipped_probes"][name] = reason
            continue
        context.report(Progress(context.node, number, len(chosen), "probe", name))
        measured = member.measure(subject, settings)
        if measured.result:
            evaluation["probes"][name] = dict(measured.result)
        if measured.versus_base:
            evaluation["versus_base"][name] = dict(measured.versus_base)
        if measured.observation:
            observations[name] = dict(measured.observation)
        if measured.array is not None:
            np.save(out_dir / f"{name}.npy", measured.array, allow_pickle=False)
        if measured.rows is not None:
            _write(out_dir / f"{name}.json", [dict(row) for row in measured.rows])
    return observations


# ---- output -----------------------------------------------------------------------------------------------------


def _write(path: Path, value: Json | list[Json]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _summary(evaluation: Json, observations: Json) -> Summary:
    versus = evaluation["versus_base"] or {}
    return {
        "family": evaluation["family"],
        "bits_per_byte": evaluation["bits_per_byte"]["value"],
        "low": evaluation["bits_per_byte"]["low"],
        "high": evaluation["bits_per_byte"]["high"],
        "documents": evaluation["documents"],
        "truncated": evaluation["truncated"],
        "size_bytes": evaluation["size_bytes"],
        "cache_bytes_per_token": evaluation["cache_bytes_per_token"],
        "tasks": {name: row["accuracy"] for name, row in evaluation["tasks"].items()},
        "uninformative_tasks": [name for name, row in evaluation["tasks"].items() if not row["informative"]],
        "baselines": evaluation["baselines"],
        "ratio": versus.get("bits_per_byte_ratio", {}).get("value"),
        "kl_nats_per_token": versus.get("kl_nats_per_token"),
        "probes": evaluation["probes"],
        **observations,
    }


def _bootstrap(config: EvaluateConfig) -> Json:
    return {
        "samples": config.bootstrap_samples,
        "seed": config.bootstrap_seed,
        "confidence": config.confidence,
    }


def _bytes_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
