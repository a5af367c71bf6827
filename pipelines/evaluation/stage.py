"""The evaluate stage: held-out bits per byte, tasks, size, latency, and a variant against its base model.

evaluation.json        the numbers; the same inputs give the same bytes
document_nats.npy      negative log likelihood of each document, for paired comparison with any other model
document_bytes.npy     bytes of each document (of its masked tokens for an encoder)
relative.npy           an encoder's documents seen from anchor documents; see `relative.py`
task_outcomes.json     0 or 1 for each item of each task, for paired comparison
tasks/                 the tasks as lm-eval reads them
observations.json      latency, memory and time: not part of the result
"""

from __future__ import annotations

import json
import math
import threading
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
from pipelines.evaluation import baselines, probe, relative, tasks
from pipelines.evaluation.config import EvaluateConfig
from pipelines.measure import heldout, intervals, scoring, windows
from pipelines.measure.batches import EvaluationBatches, plan_batches, window_tokens
from pipelines.measure.heldout import Heldout
from pipelines.measure.scoring import Scorer

RELATIVE = "relative.npy"
_PROBING = threading.Lock()
"""Two probes at once would measure each other."""


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
    held = heldout.load(prepared, config.max_documents)
    device = resolve_device(context.compute.device)
    scorer = scoring.load(model, device)
    plan = plan_batches(config, held, scorer.family, prepared)

    def report(done: int, total: int) -> None:
        context.report(Progress(context.node, done, total, "tokens", "held-out documents"))

    nats = scoring.document_nats(scorer, plan.batches, len(held.documents), report)
    evaluation = _headline(config, held, scorer, plan, nats, model)
    if "base_model" not in inputs:
        evaluation["baselines"] = _baselines(config, prepared, held, scorer.family, plan)
        train_tokens = int(held.index["splits"]["train"]["tokens"])
        evaluation["baseline_train_tokens"] = min(train_tokens, config.baseline_tokens)
        evaluation["baselines_truncated"] = train_tokens > config.baseline_tokens
    outcomes = _run_tasks(config, held, scorer, model, out_dir, context, evaluation)
    if "base_model" in inputs:
        evaluation["versus_base"] = _versus_base(config, inputs, scorer, plan, nats, outcomes)
    _relate(config, inputs, held, scorer, out_dir, evaluation)
    observed = _probe(config, model, device, context)
    _write(out_dir, evaluation, outcomes, nats, plan.sizes, observed | {"wall_s": round(time.monotonic() - started, 3)})
    return _summary(evaluation, observed)


# ---- parts of evaluation.json -----------------------------------------------------------------------------------


def _headline(
    config: EvaluateConfig,
    held: Heldout,
    scorer: Scorer,
    plan: EvaluationBatches,
    nats: NDArray[np.float64],
    model: Path,
) -> dict[str, Any]:
    return {
        "format": 1,
        "family": scorer.family,
        "bits_per_byte": intervals.bits_per_byte(nats, plan.sizes, **_bootstrap(config)).to_json(),
        "bits_per_token": float(nats.sum()) / (plan.scored * math.log(2.0)),
        "scored_tokens": plan.scored,
        "scored_bytes": int(plan.sizes.sum()),
        "documents": len(held.documents),
        "documents_total": held.total,
        "truncated": held.truncated,
        "confidence": config.confidence,
        "size_bytes": _bytes_of(model, "*"),
        "weights_bytes": _bytes_of(model, "*.safetensors"),
        "cache_bytes_per_token": scoring.cache_bytes_per_token(scorer, plan.batches[0]),
        "baselines": {},
        "versus_base": None,
    }


def _baselines(
    config: EvaluateConfig, prepared: Path, held: Heldout, family: Family, plan: EvaluationBatches
) -> dict[str, float]:
    if family == "decoder":
        return baselines.for_decoder(config, prepared, held)
    return baselines.for_encoder(config, prepared, held, plan.masked, int(plan.sizes.sum()))


def _run_tasks(
    config: EvaluateConfig,
    held: Heldout,
    scorer: Scorer,
    model: Path,
    out_dir: Path,
    context: StageContext,
    evaluation: dict[str, Any],
) -> dict[str, list[int]]:
    """Generate, write and run the tasks, enter their rows into `evaluation`, and return the outcome of every item."""
    made, skipped = tasks.generate(config.tasks, held.documents, scorer.family)
    evaluation |= {"tasks": {}, "skipped_tasks": skipped, "harness": None}
    if not made:
        return {}
    # lm-eval takes seconds to import: only a run with tasks pays for it.
    from pipelines.evaluation import harness

    tasks.write(made, out_dir / "tasks")
    outcomes = harness.run(
        scorer,
        AutoTokenizer.from_pretrained(model, local_files_only=True),
        made,
        folder=out_dir / "tasks",
        cache=context.scratch / "datasets",
        batch_size=config.tasks.batch_size,
    )
    evaluation["tasks"] = {name: outcome.to_json() for name, outcome in outcomes.items()}
    evaluation["harness"] = f"lm-eval {harness.VERSION}"
    return {name: list(outcome.correct) for name, outcome in outcomes.items()}


def _versus_base(
    config: EvaluateConfig,
    inputs: Mapping[str, Artifact],
    scorer: Scorer,
    plan: EvaluationBatches,
    nats: NDArray[np.float64],
    outcomes: dict[str, list[int]],
) -> dict[str, Any]:
    evaluated = inputs["base_evaluation"]
    base_nats = np.load(evaluated.path / "document_nats.npy", allow_pickle=False)
    base_outcomes = evaluated.read_json("task_outcomes.json")
    base_size = evaluated.read_json("evaluation.json")["size_bytes"]
    model = inputs["model"].path / "model"
    result: dict[str, Any] = {
        "bits_per_byte_ratio": intervals.paired_ratio(nats, base_nats, plan.sizes, **_bootstrap(config)).to_json(),
        "size_ratio": _bytes_of(model, "*") / base_size,
        "task_accuracy_difference": {
            name: intervals.paired_difference(correct, base_outcomes[name], **_bootstrap(config)).to_json()
            for name, correct in outcomes.items()
            if name in base_outcomes
        },
    }
    if config.kl_tokens:
        base = scoring.load(inputs["base_model"].path / "model", scorer.device)
        result |= scoring.divergence(base, scorer, windows.take(plan.batches, config.kl_tokens))
    return result


def _relate(
    config: EvaluateConfig,
    inputs: Mapping[str, Artifact],
    held: Heldout,
    scorer: Scorer,
    out_dir: Path,
    evaluation: dict[str, Any],
) -> None:
    """Write an encoder's relative representations, and enter how far a variant's space is from its base model's."""
    mine = relative.measure(scorer, held, window_tokens(config, held))
    if mine is None:
        return
    np.save(out_dir / RELATIVE, mine, allow_pickle=False)
    if "base_evaluation" in inputs:
        theirs = np.load(inputs["base_evaluation"].path / RELATIVE, allow_pickle=False)
        evaluation["versus_base"]["relative"] = relative.compare(mine, theirs, **_bootstrap(config))


def _probe(config: EvaluateConfig, model: Path, device: str, context: StageContext) -> dict[str, Any]:
    if not config.latency.enabled:
        return {}
    context.report(Progress(context.node, 0, 1, "probe", "latency and memory"))
    with _PROBING:
        return probe.measure(model, config.latency, device)


# ---- output -----------------------------------------------------------------------------------------------------


def _write(
    out_dir: Path,
    evaluation: dict[str, Any],
    outcomes: dict[str, list[int]],
    nats: NDArray[np.float64],
    sizes: NDArray[np.int64],
    observed: dict[str, Any],
) -> None:
    for name, value in (("evaluation", evaluation), ("task_outcomes", outcomes), ("observations", observed)):
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        (out_dir / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    np.save(out_dir / "document_nats.npy", nats, allow_pickle=False)
    np.save(out_dir / "document_bytes.npy", sizes, allow_pickle=False)


def _summary(evaluation: dict[str, Any], observed: dict[str, Any]) -> Summary:
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
        "baselines": evaluation["baselines"],
        "ratio": versus.get("bits_per_byte_ratio", {}).get("value"),
        "kl_nats_per_token": versus.get("kl_nats_per_token"),
        **observed.get("latency", {}),
    }


def _bootstrap(config: EvaluateConfig) -> dict[str, Any]:
    return {
        "samples": config.bootstrap_samples,
        "seed": config.bootstrap_seed,
        "confidence": config.confidence,
    }


def _bytes_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
