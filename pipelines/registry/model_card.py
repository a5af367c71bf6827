"""The model card: Hugging Face front matter and a page for people, generated from the records alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.compression.report import CompressionReport
from pipelines.core.artifact import Artifact
from pipelines.core.redaction import redact, redact_value
from pipelines.core.stage import BASES
from pipelines.measure import answers
from pipelines.modelio import load_instructions
from pipelines.registry import evidence
from pipelines.registry.config import PromoteConfig
from pipelines.registry.evidence import Evidence
from pipelines.registry.gate import Decision

_PIPELINE = {"decoder": "text-generation", "encoder": "fill-mask"}
_CARD_NAMES = {"public-domain": "pdm", "public domain": "pdm"}
"""Licences whose name on model cards is not simply theirs in lower case."""
_KNOWN = {"pdm", "cc0-1.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "apache-2.0", "mit"}
_KEY_DIGITS = 16


def _as_text(value: Any) -> Any:
    """Return a value so that Markdown shows it as text: no HTML, no link, no column or line of its own.

    Fields of a corpus stand in the card, and whoever wrote them is not to write into the pages that show it.
    """
    if isinstance(value, Markup):
        return value
    text = escape(str(value), quote=False).replace("](", "]\\(").replace("|", "\\|")
    return " ".join(text.splitlines())


_PAGE = jinja2.Environment(
    autoescape=False,  # noqa: S701 - Markdown: `_as_text` does it
    finalize=_as_text,
    trim_blocks=True,
    lstrip_blocks=True,
).from_string(
    """\
# {{ title }}

{{ sentence }}

{{ loading }}

```python
{{ snippet }}```

## Data

{{ data_sentence }}
{% if sources %}

| source | licence | documents read | kept |
|---|---|---:|---:|
{% for row in sources %}
| {{ row.source }} | {{ row.licence }} | {{ row.read }} | {{ row.kept }} |
{% endfor %}
{% endif %}

## Training

| setting | value |
|---|---|
{% for name, value in training %}
| {{ name }} | {{ value }} |
{% endfor %}

{% if models %}
## Evaluation

{{ evaluation_sentence }}

| model | bits per byte | interval | size, bytes | cache, bytes a token |
|---|---:|---|---:|---:|
{% for row in models %}
| {{ row.name }} | {{ row.bits }} | {{ row.interval }} | {{ row.size }} | {{ row.cache }} |
{% endfor %}
{% for name, bits in baselines %}
| {{ name }} (baseline) | {{ bits }} | | | |
{% endfor %}
{% if tasks %}

| task | accuracy | standard error | chance | items | |
|---|---:|---:|---:|---:|---|
{% for row in tasks %}
| {{ row.name }} | {{ row.accuracy }} | {{ row.stderr }} | {{ row.chance }} | {{ row.n }} | {{ row.note }} |
{% endfor %}
{% endif %}

{% if samples %}
## What it writes

| prompt | the model's text |
|---|---|
{% for prompt, text in samples %}
| {{ prompt }} | {{ text }} |
{% endfor %}

{% endif %}
## Gate

{{ verdict }}

| check | found | required | |
|---|---|---|---|
{% for check in checks %}
| {{ check.name }} | {{ check.found }} | {{ check.required }} | {{ "ok" if check.passed else "**broken**" }} |
{% endfor %}

{% endif %}
## Limits

{% for limit in limits %}
* {{ limit }}
{% endfor %}

## Lineage

| artifact | fingerprint | digest | made from |
|---|---|---|---|
{% for row in lineage %}
| {{ row.node }} | `{{ row.fingerprint }}` | `{{ row.digest }}` | {{ row.parents }} |
{% endfor %}

Corpus: DVC hash `{{ data_hash }}`. Code: git commit `{{ commit }}`.
"""
)


def render(
    facts: Evidence,
    models: Mapping[str, Evidence],
    inputs: Mapping[str, Artifact],
    decision: Decision,
    config: PromoteConfig,
) -> str:
    """Return the model card of one model.

    Args:
        facts: the model that the card is about.
        models: every model of the run, for comparison.
        inputs: `prepare`, `model:<name>`, `evaluation:<name>` artifacts.
        decision: what the gate said.
        config: name of the registered model.
    """
    page = _about(facts, inputs, config.model_name) | {
        "evaluation_sentence": _evaluation_sentence(facts),
        "models": [_model_row(one) for one in models.values()],
        "baselines": sorted((name, f"{bits:.4f}") for one in models.values() for name, bits in one.baselines.items()),
        "tasks": [_task_row(name, row) for name, row in facts.tasks.items()],
        "samples": _samples(inputs[f"evaluation:{facts.name}"]),
        "verdict": f"{decision.candidate}: {'accepted' if decision.accepted else 'refused'} ({decision.rule}).",
        "checks": decision.checks,
    }
    return _written(page, _front_matter(facts, models, page["sources"], config.model_name))


def of_artifact(inputs: Mapping[str, Artifact], name: str) -> str:
    """Return the model card of a model that no gate has judged: all but its evaluation.

    Args:
        inputs: `prepare` and `model:<name>` artifacts, as far as the store has them.
        name: which model.
    """
    by_digest = {artifact.digest: artifact for key, artifact in inputs.items() if key.startswith("model:")}
    facts = evidence.described(name, inputs[f"model:{name}"], by_digest)
    page = _about(facts, inputs, "ingot")
    return _written(page, _front_matter(facts, {}, page["sources"], "ingot"))


def licence_of(card: str) -> str:
    """Return the licence that a card's front matter names."""
    import yaml

    front = yaml.safe_load(card.split("---\n", 2)[1])
    return str(front.get("license_details") if front["license"] == "other" else front["license"])


def _about(facts: Evidence, inputs: Mapping[str, Artifact], title: str) -> dict[str, Any]:
    """Return what is known of a model without its evaluation."""
    prepare, model = inputs.get("prepare"), inputs[f"model:{facts.name}"]
    record, how = model.manifest.provenance, load_instructions.of(model)
    return {
        "title": f"{title}: {facts.name}",
        "sentence": _sentence(facts, model),
        "loading": Markup(how.sentence),  # noqa: S704 - ours
        "snippet": Markup(how.snippet(load_instructions.LOADER[facts.family])),  # noqa: S704 - ours
        "sources": source_rows(prepare) if prepare is not None else [],
        "data_sentence": _data_sentence(prepare),
        "training": _training_rows(inputs, facts),
        "limits": _limits(facts),
        "lineage": [_lineage_row(name, artifact) for name, artifact in inputs.items()],
        "data_hash": (record.data_hash if record else None) or "unknown",
        "commit": record.git_commit if record else "unknown",
    }


def _written(page: dict[str, Any], front: str) -> str:
    return f"---\n{front}---\n\n{redact(_PAGE.render(page))}"


def without_front_matter(card: str) -> str:
    """Return the page for people alone: MLflow would show the front matter as a heading."""
    return card.partition("\n---\n")[2].lstrip()


def source_rows(prepare: Artifact) -> list[dict[str, Any]]:
    """Return one row per source of the corpus, from the report of its preparation alone: documents are not opened."""
    report = prepare.read_json("report.json") if "report.json" in prepare.manifest.files else {}
    return [
        {
            "source": name,
            "licence": ", ".join(row.get("licenses") or ["unknown"]),
            "read": row.get("read", ""),
            "kept": row.get("kept", ""),
        }
        for name, row in sorted((report.get("sources") or {}).items())
    ]


def _front_matter(
    facts: Evidence, models: Mapping[str, Evidence], sources: list[dict[str, Any]], registered: str
) -> str:
    import yaml

    licences = sorted({row["licence"] for row in sources})
    only = _CARD_NAMES.get(licences[0].lower(), licences[0].lower()) if len(licences) == 1 else None
    front: dict[str, Any] = {"license": only if only in _KNOWN else "other"}
    if only not in _KNOWN:
        front |= {"license_name": "licences-of-the-corpus", "license_details": escape("; ".join(licences)) or "unknown"}
    front |= {"library_name": "transformers", "pipeline_tag": _PIPELINE[facts.family], "tags": ["ingot", facts.method]}
    front["datasets"] = [escape(row["source"]) for row in sources]
    base = next((one for one in models.values() if one.fingerprint == facts.base), None)
    if base is not None:
        front["base_model"] = f"{registered}/{base.name}-{base.fingerprint[:_KEY_DIGITS]}"
        front["base_model_relation"] = "quantized"
    if models:
        front["model-index"] = [{"name": f"{registered}-{facts.name}", "results": [_index_entry(facts)]}]
    return yaml.safe_dump(redact_value("", front), sort_keys=False, allow_unicode=True)


def _index_entry(facts: Evidence) -> dict[str, Any]:
    metrics = [{"type": "bits_per_byte", "value": facts.bits_per_byte["value"], "name": "held-out bits per byte"}]
    metrics += [{"type": "accuracy", "value": row["accuracy"], "name": name} for name, row in facts.tasks.items()]
    return {
        "task": {"type": _PIPELINE[facts.family]},
        "dataset": {"type": "held-out", "name": f"test split {facts.test_digest[:_KEY_DIGITS]}"},
        "metrics": metrics,
    }


def _sentence(facts: Evidence, model: Artifact) -> str:
    kind = "causal language model" if facts.family == "decoder" else "masked language model"
    if facts.base is None:
        if facts.name == "base":
            return f"A {kind} from elsewhere, measured by Ingot as it is."
        return f"A {kind}, pretrained from scratch with Ingot."
    bits = "" if facts.bits is None else f" to {facts.bits:.3g} bits per weight of the compressed layers"
    whole = CompressionReport.read(model.path).totals.model_bits_per_weight
    stored = "" if whole is None else f"; with all its other tensors {whole:.3g} bits for each weight of its base model"
    return f"A {kind}, compressed with {facts.method}{bits}{stored}, from `{facts.base[:_KEY_DIGITS]}`."


def _data_sentence(prepare: Artifact | None) -> str:
    if prepare is None:
        return "The prepared corpus is not in this store."
    splits = (prepare.read_json("index.json") if "index.json" in prepare.manifest.files else {}).get("splits") or {}
    parts = [
        f"{name} {row.get('documents', '?')} documents, {row.get('tokens', '?')} tokens" for name, row in splits.items()
    ]
    return "Split by work, near-duplicates removed: " + ("; ".join(parts) or "see the prepare artifact") + "."


def _training_rows(inputs: Mapping[str, Artifact], facts: Evidence) -> list[tuple[str, str]]:
    trained = [inputs[f"model:{name}"] for name in dict.fromkeys([*BASES, facts.name]) if f"model:{name}" in inputs]
    return [
        (f"{one.manifest.stage}: {key}", f"{value:.6g}" if isinstance(value, float) else str(value))
        for one in trained
        for key, value in one.manifest.summary.items()
        if isinstance(value, str | int | float)
    ]


def _evaluation_sentence(facts: Evidence) -> str:
    text = f"{len(facts.nats)} held-out documents; intervals by resampling documents."
    return text + (" **Truncated: not every held-out document was measured.**" if facts.truncated else "")


def _model_row(one: Evidence) -> dict[str, str]:
    bits = one.bits_per_byte
    interval = f"{bits['low']:.4f} to {bits['high']:.4f}"
    cache = "" if one.cache_bytes is None else f"{one.cache_bytes:,.1f}"
    size = f"{one.size_bytes:,}"
    return {"name": one.name, "bits": f"{bits['value']:.4f}", "interval": interval, "size": size, "cache": cache}


def _task_row(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    note = "" if row.get("informative", True) else "no better than chance here: it says nothing"
    return {"name": name, "note": note} | {key: f"{value:.4g}" for key, value in _numbers(row).items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def _samples(evaluation: Artifact) -> list[tuple[str, str]]:
    """Return the fixed prompts of an evaluation and what the model made of each; none where it kept no texts."""
    if answers.FILE not in evaluation.manifest.files:
        return []
    return [(row["prompt"], "\n".join(answers.lines(row))) for row in evaluation.read_json(answers.FILE)]


def _limits(facts: Evidence) -> list[str]:
    limits = [
        "It knows the style of its corpus and little else; it states falsehoods fluently.",
        "It was not aligned, filtered for harmful output, or tested for bias.",
        "Bits per byte compare models only on the same held-out text; see the digest in the lineage.",
    ]
    if facts.base is not None:
        limits.append("Compression may hurt inputs unlike the held-out text more than the average shows.")
    if facts.truncated:
        limits.append("The evaluation was truncated; its numbers are provisional.")
    return limits


def _lineage_row(name: str, artifact: Artifact) -> dict[str, str]:
    parents = ", ".join(f"{key} `{digest[:_KEY_DIGITS]}`" for key, digest in artifact.manifest.parents.items())
    return {
        "node": name,
        "fingerprint": artifact.manifest.fingerprint[:_KEY_DIGITS],
        "digest": artifact.digest[:_KEY_DIGITS],
        "parents": parents or "the corpus",
    }
