"""The promote stage: gate, registration, verification, alias.

Nothing is registered before the gate has said yes, and the alias moves last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.core import program
from pipelines.core.artifact import Artifact
from pipelines.core.errors import GateRefused
from pipelines.core.redaction import redact_value
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.registry import evidence, gate, history, incumbent, model_card, package
from pipelines.registry.config import PromoteConfig
from pipelines.registry.evidence import Evidence
from pipelines.registry.gate import Decision
from pipelines.registry.registry import CHALLENGER, Registry, opened
from pipelines.tracking.config import config_of

DECISION = "decision.json"


def run(config: PromoteConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Judge the candidate and make it champion.

    Args:
        config: gate and name of the registered model.
        inputs: `prepare`, `model:<name>`, `evaluation:<name>`.
        out_dir: receives decision.json and model_card.md.
        context: `tracking` names MLflow and the run of this stage.

    Raises:
        GateRefused: with a table of the numbers, the broken conditions named.
        TransientError: MLflow does not answer.
        IntegrityError: the registry returned other bytes than it was given, or the champion's evidence is damaged.
    """
    models = evidence.read(inputs)
    candidate, passed_over = gate.choose(models, config)
    tracking = config_of(context.tracking)
    with opened(tracking, context.store, config.model_name) as registry:
        promoted = False
        while not promoted:  # again when another champion took over while this one was being registered
            holder = registry.champion()
            champion = incumbent.of(registry, holder, candidate, inputs["prepare"], config, context)
            decision = gate.decide(candidate, models, champion.evidence, config, obstacle=champion.obstacle)
            text = model_card.render(candidate, models, inputs, decision, config)
            _write(decision, passed_over, text, out_dir)
            if not decision.accepted:
                _refuse(decision, registry, candidate)
            run_id = context.tracking.run_id or registry.run_for(candidate, tracking)
            job = _Promotion(registry, inputs, models, run_id, context)
            version = job.register(candidate, text, examined=True)
            facts = {"versus_champion": decision.versus_champion, "gain": decision.gain, "run_id": run_id}
            promoted = registry.promote(version, decision.rule, facts, over=holder)
        if config.register_variants:
            for variant in gate.within_budget(models, config):
                extra = job.register(variant, model_card.render(variant, models, inputs, decision, config))
                registry.note_registered(extra)
    return {
        "model": config.model_name,
        "version": str(version.version),
        "candidate": candidate.name,
        "rule": decision.rule,
        "bits_per_byte": candidate.bits_per_byte["value"],
        "size_bytes": candidate.size_bytes,
    }


class _Promotion:
    """What the registration of each model of one run shares."""

    def __init__(
        self,
        registry: Registry,
        inputs: Mapping[str, Artifact],
        models: Mapping[str, Evidence],
        run_id: str,
        context: StageContext,
    ) -> None:
        self._registry, self._inputs, self._models = registry, inputs, models
        self._run_id, self._context = run_id, context

    def register(self, facts: Evidence, text: str, *, examined: bool = False) -> Any:
        """Return the verified version of one model; one under examination is marked as the candidate meanwhile."""
        self._context.report(Progress(self._context.node, 0, 1, "models", f"registering {facts.name}"))
        model = self._inputs[f"model:{facts.name}"]
        folder = self._context.scratch / f"package-{facts.name}"

        def build() -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            package.build(model, facts, text, folder)
            return folder

        version = self._registry.register(
            facts,
            build,
            version_tags(facts, model, self._inputs["prepare"]),
            run_id=self._run_id,
            description=model_card.without_front_matter(text),
        )
        shutil.rmtree(folder, ignore_errors=True)
        if examined:
            self._registry.mark_candidate(version)
        self._registry.verify(version, package.hashes_of(model.manifest))
        return version


def version_tags(facts: Evidence, model: Artifact, prepare: Artifact) -> dict[str, str]:
    """Return the tags of a version: where it comes from, and its headline numbers."""
    record = model.manifest.provenance
    return {
        "fingerprint": facts.fingerprint,
        "digest": facts.digest,
        evidence.EVIDENCE_TAG: evidence.digest(facts),
        "base": facts.base or "",
        "parent": model.manifest.parents.get("model", ""),
        "method": facts.method,
        "bits": "" if facts.bits is None else f"{facts.bits:g}",
        "family": facts.family,
        "dvc_hash": (record.data_hash if record else None) or "",
        "git_commit": record.git_commit if record else program.commit(),
        "prepare_digest": prepare.digest,
        "test_digest": facts.test_digest,
        "bits_per_byte": repr(facts.bits_per_byte["value"]),
        "size_bytes": str(facts.size_bytes),
        "truncated_evaluation": str(facts.truncated).lower(),
        **{f"accuracy.{task}": repr(result["accuracy"]) for task, result in facts.tasks.items()},
    }


def _write(decision: Decision, passed_over: list[str], text: str, out_dir: Path) -> None:
    record = redact_value("", decision.to_json() | {"passed_over": passed_over})
    (out_dir / DECISION).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (out_dir / package.CARD).write_text(text, encoding="utf-8")


def _refuse(decision: Decision, registry: Registry, candidate: Evidence) -> None:
    broken = ", ".join(decision.broken)
    if (known := registry.find(candidate)) is not None:
        registry.release(CHALLENGER, str(known.version))
    history.append(
        registry.store_root,
        registry.model,
        history.REFUSED,
        version=None,
        why=f"{decision.rule}: {broken}",
        fingerprint=candidate.fingerprint,
        decision=decision.to_json(),
    )
    raise GateRefused(
        f"{candidate.name} is not promoted to {registry.model}; broken: {broken}\n{gate.table(decision)}",
        hint="the artifacts are kept; change the recipe or its promote budgets, then run again",
    )
