"""What the gate knows of one model: its identity and its measurements, from artifacts or from a registered version.

An `Evidence` also says what is wrong with the measurements themselves: missing, of another model, on another corpus.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.compression.report import FILE, CompressionReport
from pipelines.core import fingerprint
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, GateRefused, IntegrityError
from pipelines.core.stage import BASES

OURS = "ingot"
"""Folder of a registered version with what Ingot knows of it."""
EVIDENCE_TAG = "evidence_sha256"
EVIDENCE_FILE = "evidence.json"
NATS_FILE = "document_nats.npy"
SIZES_FILE = "document_bytes.npy"
RELATIVE_FILE = "relative.npy"
_ARRAYS = {NATS_FILE: "nats", SIZES_FILE: "sizes", RELATIVE_FILE: "relative"}
OUTCOMES_FILE = "task_outcomes.json"
TEST_SPLIT = "documents/test.jsonl.zst"
_PRECISION = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}
"""Bits per weight of a model that is not compressed, by the `dtype` of its config.json."""


def preview(inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Return all evaluations in one table: what people see before the gate decides on them."""
    from pipelines.measure import intervals

    measured = {
        name.removeprefix("evaluation:"): intervals.read(artifact.path)
        for name, artifact in inputs.items()
        if name.startswith("evaluation:")
    }
    return intervals.table(measured) if measured else []


@dataclass(frozen=True)
class Evidence:
    """One model's identity and measurements."""

    name: str
    """`pretrain`, `base`, or the name of a variant."""
    fingerprint: str
    digest: str
    base: str | None
    """Fingerprint of the pretrained model that it descends from, through however many variants; None for that one."""
    family: str
    test_digest: str
    """sha256 of the held-out documents: equal for two models measured on the same text."""
    bits_per_byte: Mapping[str, float]
    """value, low, high."""
    tasks: Mapping[str, Mapping[str, float]]
    """Task -> accuracy, stderr, n, chance."""
    size_bytes: int
    nats: NDArray[np.float64]
    """Negative log likelihood of each held-out document [documents]."""
    sizes: NDArray[np.int64]
    """Bytes of each held-out document [documents]."""
    outcomes: Mapping[str, list[int]] = field(default_factory=dict)
    """Task -> 0 or 1 for each item, in one order for all models measured on the same text."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    kl_nats: float | None = None
    decode_ms: float | None = None
    cache_bytes: float | None = None
    """Bytes of attention cache for each token; None for an encoder."""
    relative: NDArray[np.float64] | None = None
    """An encoder's documents seen from anchors [documents, anchors]; see `pipelines.evaluation.probes.relative`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: what two models must have in common, and what measuring another model so needs to know."""
    truncated: bool = False
    method: str = "none"
    bits: float | None = None
    """Stored bits per weight: of all weights of a model that is not compressed, of a variant's compressed layers."""
    weights_bytes: int | None = None
    """Bytes of its weight files."""
    problems: tuple[str, ...] = ()
    """Why the measurements cannot be trusted; empty when they can."""
    version: str | None = None
    """Version in the registry, for a registered model."""
    measured_again: str = ""
    """Why a registered model was measured again for this comparison; empty when it was not."""

    def facts(self) -> dict[str, Any]:
        """Return everything but the arrays, as JSON values."""
        apart = {"nats", "sizes", "relative", "problems", "version", "measured_again"}
        return {name: value for name, value in vars(self).items() if name not in apart}


def read(inputs: Mapping[str, Artifact]) -> dict[str, Evidence]:
    """Return the evidence on every model among the inputs of the promote stage, the base first.

    Args:
        inputs: `prepare`, `model:<name>` and `evaluation:<name>` artifacts.

    Raises:
        GateRefused: a model has no evaluation.
    """
    models = {key.partition(":")[2]: model for key, model in inputs.items() if key.startswith("model:")}
    missing = [name for name in models if f"evaluation:{name}" not in inputs]
    if missing or not models:
        raise GateRefused(
            f"no evaluation of {', '.join(missing)}" if missing else "no model is put forward",
            hint="run the evaluate stage first: `ingot run`",
        )
    by_digest = {model.digest: model for model in models.values()}
    return {
        name: of_artifacts(name, models[name], inputs[f"evaluation:{name}"], inputs["prepare"], by_digest)
        for name in sorted(models, key=lambda name: name not in BASES)
    }


def of_artifacts(
    name: str, model: Artifact, evaluation: Artifact, prepare: Artifact, by_digest: Mapping[str, Artifact]
) -> Evidence:
    """Return the evidence on one model; `by_digest` holds the models that it may descend from."""
    measured = evaluation.read_json("evaluation.json")
    versus = measured.get("versus_base") or {}
    method, bits = _method(model)
    return Evidence(
        name=name,
        fingerprint=model.manifest.fingerprint,
        digest=model.digest,
        base=_base(model, by_digest),
        family=str(measured.get("family", "decoder")),
        test_digest=test_digest(prepare),
        bits_per_byte=measured["bits_per_byte"],
        tasks=measured.get("tasks") or {},
        size_bytes=int(measured["size_bytes"]),
        nats=_load(evaluation.path / NATS_FILE),
        sizes=_load(evaluation.path / SIZES_FILE),
        outcomes=_json(evaluation, OUTCOMES_FILE),
        baselines=measured.get("baselines") or {},
        kl_nats=versus.get("kl_nats_per_token"),
        decode_ms=_decode_ms(evaluation),
        relative=_load_if_there(evaluation.path / RELATIVE_FILE),
        cache_bytes=measured.get("cache_bytes_per_token"),
        settings=measured.get("settings") or {},
        truncated=bool(measured.get("truncated", False)),
        method=method,
        bits=bits,
        weights_bytes=measured.get("weights_bytes"),
        problems=tuple(_problems(model, evaluation, prepare)),
    )


def save(evidence: Evidence, folder: Path) -> None:
    """Write evidence beside a registered model, for comparison with later candidates."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(evidence).items():
        (folder / name).write_bytes(content)


def digest(evidence: Evidence) -> str:
    """Return the sha256 over the files that `save` writes: what a version is tagged with, and `load` demands."""
    return fingerprint.digest({name: hashlib.sha256(content).hexdigest() for name, content in _files(evidence).items()})


def load(folder: Path, version: str, expected: str) -> Evidence:
    """Read back what `save` wrote.

    Args:
        folder: where.
        version: number of the registered version.
        expected: what `digest` gave when it was saved.

    Raises:
        IntegrityError: the files are not those that were saved.
        ConfigError: another version of Ingot wrote them.
    """
    names = [name for name in (EVIDENCE_FILE, *_ARRAYS) if (folder / name).is_file()]
    actual = fingerprint.digest({name: fingerprint.hash_file(folder / name) for name in names})
    if actual != expected:
        raise IntegrityError(
            f"the evidence of version {version} is damaged: sha256 {actual} over its files, its tag says {expected}",
            hint=f"restore {OURS}/ of that version in the registry's storage; or delete the version's tag "
            f"`{EVIDENCE_TAG}` in MLflow, and the next promotion measures the model again",
        )
    try:
        facts = json.loads((folder / EVIDENCE_FILE).read_bytes())
        arrays = {field: np.load(folder / name, allow_pickle=False) for name, field in _ARRAYS.items() if name in names}
        return Evidence(**facts, **arrays, version=version)
    except ValueError as error:
        raise IntegrityError(f"the evidence of version {version} is not what Ingot writes: {error}") from error
    except TypeError as error:
        raise ConfigError(
            f"the evidence of version {version} was written by another version of Ingot: {error}",
            hint="update the checkout to the version that registered it",
        ) from error


def _files(evidence: Evidence) -> dict[str, bytes]:
    """Return the files of saved evidence, by name; the same evidence gives the same bytes."""
    text = json.dumps(evidence.facts(), indent=1, sort_keys=True) + "\n"
    files = {EVIDENCE_FILE: text.encode()}
    for name, field_name in _ARRAYS.items():
        if (array := getattr(evidence, field_name)) is not None:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            files[name] = buffer.getvalue()
    return files


def described(name: str, model: Artifact, by_digest: Mapping[str, Artifact]) -> Evidence:
    """Return what is known of a model that was not evaluated: its identity, family and method, and no numbers."""
    names = _json(model, "model/config.json").get("architectures") or [""]
    method, bits = _method(model)
    return Evidence(
        name=name,
        fingerprint=model.manifest.fingerprint,
        digest=model.digest,
        base=_base(model, by_digest),
        family="decoder" if names[0].endswith(("ForCausalLM", "LMHeadModel")) else "encoder",
        test_digest="",
        bits_per_byte={},
        tasks={},
        size_bytes=sum(r.size for file, r in model.manifest.files.items() if file.startswith("model/")),
        nats=np.zeros(0),
        sizes=np.zeros(0, np.int64),
        method=method,
        bits=bits,
    )


def footprint(model: Evidence, cache_tokens: int) -> float:
    """Return the bytes of a model on disk and of its attention cache for so many tokens."""
    return model.size_bytes + cache_tokens * (model.cache_bytes or 0.0)


def test_digest(prepare: Artifact) -> str:
    """Return the identity of the held-out documents of a prepare artifact."""
    record = prepare.manifest.files.get(TEST_SPLIT)
    return record.sha256 if record is not None else prepare.digest


def _base(model: Artifact, by_digest: Mapping[str, Artifact]) -> str | None:
    """Follow a variant up to the pretrained model, which its evaluation compares it with."""
    above = model.manifest.parents.get("model")
    if above is None:
        return None
    base = by_digest.get(above)
    return above if base is None else _base(base, by_digest) or base.manifest.fingerprint


def _load(path: Path) -> NDArray[Any]:
    return np.load(path, allow_pickle=False)


def _load_if_there(path: Path) -> NDArray[Any] | None:
    return _load(path) if path.is_file() else None


def _decode_ms(evaluation: Artifact) -> float | None:
    return (_json(evaluation, "observations.json").get("latency") or {}).get("decode_ms_per_token")


def _json(made: Artifact, name: str) -> dict[str, Any]:
    """Return a JSON file of an artifact, empty when it has none."""
    return made.read_json(name) if name in made.manifest.files else {}


def _method(model: Artifact) -> tuple[str, float | None]:
    """Return the compression method and the bits per weight of the layers that it compressed."""
    if FILE not in model.manifest.files:
        return "none", _PRECISION.get(str(_json(model, "model/config.json").get("dtype")))
    report = CompressionReport.read(model.path)
    return report.method, report.totals.bits_per_weight


def _problems(model: Artifact, evaluation: Artifact, prepare: Artifact) -> list[str]:
    """Say why an evaluation does not speak for a model."""
    found = []
    if evaluation.manifest.parents.get("model") != model.digest:
        found.append("the evaluation is of another model")
    if evaluation.manifest.parents.get("prepare") != prepare.digest:
        found.append("the evaluation used another prepared corpus")
    ours, theirs = (a.manifest.files.get(f"{d}/tokenizer.json") for a, d in ((model, "model"), (prepare, "tokenizer")))
    if ours is None or theirs is None:
        found.append("tokenizer.json is missing")
    elif ours.sha256 != theirs.sha256:
        found.append(f"wrong tokenizer: {ours.sha256[:12]}, the corpus has {theirs.sha256[:12]}")
    return found
