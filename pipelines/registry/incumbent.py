"""The champion as a candidate meets it: by the evidence it was registered with, or measured again.

Numbers compare only if they were measured on the same text in the same way. A champion that was registered with other
evaluation settings, by another program or by an Ingot that kept no hash of its evidence is therefore scored here, on
the candidate's held-out documents and at the candidate's settings, from the bytes that the registry holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipelines.core import fingerprint
from pipelines.core.artifact import Artifact
from pipelines.core.compute import resolve_device
from pipelines.core.errors import IngotError, IntegrityError
from pipelines.core.stage import Progress, StageContext
from pipelines.measure import heldout, intervals
from pipelines.measure.batches import plan_batches
from pipelines.measure.config import BatchSettings
from pipelines.measure.heldout import Heldout
from pipelines.modelio.folder import family_of
from pipelines.registry import gate
from pipelines.registry.config import PromoteConfig
from pipelines.registry.evidence import Evidence, test_digest
from pipelines.registry.registry import Registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_STRANGE = (SafetensorError, KeyError, RuntimeError, TypeError)
"""How transformers ends on a folder of others that it cannot read."""
_TOKENIZER_FOLDERS = (".", "../components/tokenizer", "../tokenizer")
"""Where a registered version keeps its tokenizer, from the model folder: Hugging Face's, then MLflow's place."""


@dataclass(frozen=True)
class Incumbent:
    """Who holds the title."""

    evidence: Evidence | None = None
    """None when nobody holds it, or when its numbers cannot be had."""
    obstacle: str = ""
    """Why the numbers of a champion cannot be had; empty otherwise."""


def of(
    registry: Registry,
    holder: ModelVersion | None,
    candidate: Evidence,
    prepare: Artifact,
    config: PromoteConfig,
    context: StageContext,
) -> Incumbent:
    """Return the champion's numbers, comparable with the candidate's wherever they can be had.

    Args:
        registry: the registered model.
        holder: the version that the alias names; None when there is none.
        candidate: who is put forward.
        prepare: the corpus that the candidate was measured on.
        config: with `allow_new_test_set` nothing is measured again.
        context: of the promote stage.

    Raises:
        IntegrityError: the champion's evidence, or its bytes in the registry, are damaged.
    """
    if holder is None:
        return Incumbent()
    known = registry.evidence(holder)
    number = str(holder.version)
    if (holder.tags.get("fingerprint"), holder.tags.get("digest")) == (candidate.fingerprint, candidate.digest):
        return Incumbent(known or replace(candidate, version=number))
    if known is None:
        difference: str | None = f"version {number} was registered without evidence that Ingot can verify"
    else:
        difference = gate.incomparable(candidate, known)
    if difference is None or (known is not None and (config.allow_new_test_set or known.family != candidate.family)):
        return Incumbent(known)
    with registry.verified(holder) as folder:
        try:
            measured = _measure(folder, candidate, prepare, context)
        except (IngotError, *_STRANGE) as error:
            reason = error.message if isinstance(error, IngotError) else f"{type(error).__name__}: {error}"
            return Incumbent(known, f"{difference}; measuring version {number} again failed: {reason}")
    about = known or _stranger(holder, candidate)
    if about.test_digest != candidate.test_digest:
        measured |= {"relative": None}  # it describes other documents
    return Incumbent(replace(about, **measured, version=number, measured_again=difference))


def _stranger(holder: ModelVersion, candidate: Evidence) -> Evidence:
    """Return the evidence on a version that others registered, still without numbers."""
    tags = holder.tags
    return Evidence(
        name=f"version {holder.version}",
        fingerprint=tags.get("fingerprint", ""),
        digest=tags.get("digest", ""),
        base=tags.get("base") or None,
        family=candidate.family,
        test_digest=candidate.test_digest,
        bits_per_byte={},
        tasks={},
        size_bytes=0,
        nats=candidate.nats[:0],
        sizes=candidate.sizes[:0],
    )


def _measure(package: Path, candidate: Evidence, prepare: Artifact, context: StageContext) -> dict[str, Any]:
    """Score the model of a registered version as the candidate was scored; return fields of its evidence."""
    from pipelines.measure import scoring

    folder, tokenizer = _model_in(package)
    if (family := family_of(folder)) != candidate.family:
        raise IntegrityError(f"it is a {family}, the candidate a {candidate.family}")
    scorer = scoring.load(folder, resolve_device(context.compute.device))
    documents = _documents(prepare, tokenizer, candidate)
    settings = _settings(candidate.settings, getattr(scorer.model.config, "max_position_embeddings", None))
    planned = plan_batches(settings, documents, scorer.family, prepare.path)

    def report(done: int, total: int) -> None:
        context.report(Progress(context.node, done, total, "tokens", "measuring the champion again"))

    nats = scoring.document_nats(scorer, planned.batches, len(documents.documents), report)
    return {
        "nats": nats,
        "sizes": planned.sizes,
        "bits_per_byte": intervals.bits_per_byte(nats, planned.sizes).to_json(),
        "settings": candidate.settings,
        "test_digest": test_digest(prepare),
        "cache_bytes": scoring.cache_bytes_per_token(scorer, planned.batches[0]),
        "size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def _settings(wanted: Mapping[str, Any], limit: int | None) -> BatchSettings:
    """Return the candidate's settings; a model is shown at most as much as it was made for."""
    context = min(int(wanted["context"]), limit or int(wanted["context"]))
    given = {name: wanted[name] for name in ("mask_rate", "mask_seed") if name in wanted}
    stride = min(int(wanted["stride"]), context) if "stride" in wanted else None
    return BatchSettings(
        context=context, stride=stride, batch_tokens=max(int(wanted["batch_tokens"]), context), **given
    )


def _model_in(package: Path) -> tuple[Path, Path]:
    """Return the model folder of a registered version and its tokenizer.json."""
    for config in sorted(package.rglob("config.json"), key=lambda path: len(path.parts)):
        folder = config.parent
        tokenizers = [folder / place / heldout.TOKENIZER for place in _TOKENIZER_FOLDERS]
        tokenizer = next((path for path in tokenizers if path.is_file()), None)
        if tokenizer is not None and any(folder.glob("*.safetensors")):
            return folder, tokenizer
    raise IntegrityError("it holds no Hugging Face model folder with safetensors weights and a tokenizer.json")


def _documents(prepare: Artifact, tokenizer: Path, candidate: Evidence) -> Heldout:
    """Return the candidate's held-out documents in the tokens of another model."""
    documents = heldout.load(prepare.path, candidate.settings["max_documents"])
    own = prepare.path / "tokenizer" / heldout.TOKENIZER
    if fingerprint.hash_file(own) == fingerprint.hash_file(tokenizer):
        return documents
    if candidate.family == "encoder":
        raise IntegrityError("it has another tokenizer, so that its masks would hide other bytes")
    index = documents.index | _ends(tokenizer)
    return replace(documents, tokens=heldout.tokenize(documents.documents, tokenizer, index), index=index)


def _ends(tokenizer: Path) -> dict[str, int]:
    """Return the ids around a document; a tokenizer with one such token has it for both ends, as GPT-2's has."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer.parent, local_files_only=True)
    first, last = loaded.bos_token_id, loaded.eos_token_id
    if first is None and last is None:
        raise IntegrityError("its tokenizer has neither a start nor an end token, so that no first token can be scored")
    return {"bos_id": last if first is None else first, "eos_id": first if last is None else last}
