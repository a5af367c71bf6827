"""The prepare stage: from the corpus that DVC names to documents, a tokenizer and packed sequences, by split.

Six steps, each a stream from disk to disk: survey (read, clean, filter, drop copies), deduplicate, split, look for
held-out text in the training text, train the tokenizer, pack. The same corpus and configuration give the same bytes,
whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import project
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.data import contamination, dedup, document_files, reader, sequences, tokenizer, versioning
from pipelines.data.config import TOKENIZER_WORDS, PrepareConfig, PrepareJob
from pipelines.data.report import DocumentCounts
from pipelines.data.split import SPLITS, assign, group_names
from pipelines.data.survey import QUARANTINE, Survey, survey

TOKENIZER = "tokenizer"
REPORT = "report.json"
_STEPS = ("survey", "deduplicate", "split", "contamination", "tokenizer", "pack")


def run(config: PrepareJob, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Prepare the corpus; see the module for the steps and `tokenizer/`, `index.json`, `report.json` for the result.

    Raises:
        IntegrityError: the corpus is not the one that data.dvc names, is empty, has too many malformed records, or is
            too small to be split or packed.
    """
    context.scratch.mkdir(parents=True, exist_ok=True)
    corpus = versioning.checkout_corpus(config.data, context.scratch, context.project or project.find())
    init_weights = inputs.get("init_weights")
    try:
        brought = None if config.prepare.tokenizer in TOKENIZER_WORDS else Path(config.prepare.tokenizer)
        tokenizer_of = init_weights.path / "model" if init_weights else brought
        return prepare(corpus, config.prepare, out_dir, context, tokenizer_of)
    except OSError:
        shutil.rmtree(context.scratch, ignore_errors=True)  # no later attempt could use it, and it may fill the disk
        raise


def prepare(
    corpus: versioning.Corpus,
    config: PrepareConfig,
    out_dir: Path,
    context: StageContext,
    tokenizer_of: Path | None = None,
) -> Summary:
    """Prepare files that were verified before; they are verified again as they are read.

    Args:
        corpus: the files.
        config: what to do with them.
        out_dir: where the result goes.
        context: of the stage.
        tokenizer_of: model folder whose tokenizer is taken; None trains one.

    Raises:
        IntegrityError: the files changed, are empty, have too many malformed records, or are too few.
    """
    context.scratch.mkdir(parents=True, exist_ok=True)
    counts = DocumentCounts()
    say = _announcer(context)
    records = reader.read(corpus.path, config, md5=corpus.md5)
    surveyed = survey(records, context.scratch, config, counts, lambda done: say(0, f"{done} documents"))
    say(1, f"{len(surveyed.works)} documents to compare")
    first_of_cluster = dedup.clusters(surveyed.signatures, config.near_duplicate_similarity)
    say(2, "dividing works among splits")
    groups = _split(surveyed, first_of_cluster, config, out_dir, counts)
    say(3, "comparing held-out with training text")
    shared = _contamination(out_dir, config)
    say(
        4, f"{counts.documents('train')} documents to learn from, which hold {shared['share']:.2%} of the held-out text"
    )
    if tokenizer_of is not None:
        trained = tokenizer.load(tokenizer_of, may_grow=config.tokenizer != "init_weights")
    else:
        how = config.tokenizer_training
        sample = tokenizer.training_sample(_texts(out_dir, "train"), counts.bytes("train"), how, config.seed)
        trained = tokenizer.train(sample, config.vocab_size, how)
    trained.save(out_dir / TOKENIZER, config.sequence_length)
    say(5, f"{trained.vocab_size} tokens in the vocabulary")
    index = sequences.write(trained, out_dir, config, counts)
    duplicates = _duplicates(first_of_cluster, counts)
    report = {
        **counts.to_json(),
        "duplicates": duplicates,
        "groups": groups,
        "quarantined": surveyed.quarantined,
        "duplicate_ids": surveyed.duplicate_ids,
        "contamination": shared,
    }
    _write_json(out_dir / REPORT, report)
    shutil.copyfile(context.scratch / QUARANTINE, out_dir / QUARANTINE)
    say(6, "done")
    return _summary(index, counts, shared, surveyed.quarantined, corpus.hash)


def _announcer(context: StageContext) -> Callable[[int, str], None]:
    def say(step: int, message: str) -> None:
        name = _STEPS[min(step, len(_STEPS) - 1)]
        context.report(Progress(context.node, step, len(_STEPS), "steps", f"{name}: {message}"))

    return say


def _split(
    surveyed: Survey, first_of_cluster: list[int], config: PrepareConfig, out_dir: Path, counts: DocumentCounts
) -> dict[str, int]:
    """Write `documents/<split>.jsonl.zst` without the near-duplicates and return the number of groups per split."""
    if not surveyed.works:
        raise IntegrityError(
            f"no document is left of the corpus; dropped: {counts.reasons() or 'none, it is empty'}",
            hint="check the thresholds in the section prepare, and the corpus with `ingot data status`",
        )
    near = ((surveyed.works[first], work) for first, work in zip(first_of_cluster, surveyed.works, strict=True))
    group_of = group_names(surveyed.works + [later for _, later in surveyed.links], [*surveyed.links, *near])
    side_of = assign((group_of[work] for work in surveyed.works), config)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(document_files.DocumentWriter(_documents(out_dir, split))) for split in SPLITS
        }
        for number, document in enumerate(document_files.documents(surveyed.documents)):
            if first_of_cluster[number] != number:
                counts.drop(document.source, "near duplicate")
                continue
            split = side_of[group_of[document.work]]
            writers[split].write(document)
            counts.keep(document, split)
    _refuse_few(counts, config)
    return {split: sum(side == split for side in side_of.values()) for split in SPLITS}


def _refuse_few(counts: DocumentCounts, config: PrepareConfig) -> None:
    """Refuse held-out splits of fewer documents than anything can be measured on."""
    for split in ("validation", "test"):
        if (found := counts.documents(split)) < config.min_held_out_documents:
            raise IntegrityError(
                f"the {split} split has {found} {'document' if found == 1 else 'documents'}, "
                f"prepare.min_held_out_documents asks for {config.min_held_out_documents}",
                hint=f"raise prepare.{split}_fraction, add documents, or give independent ones a `work` of their own",
            )


def _contamination(out_dir: Path, config: PrepareConfig) -> dict[str, Any]:
    """Return what the held-out splits share with the training text, or refuse it."""
    held_out = {split: document_files.documents(_documents(out_dir, split)) for split in SPLITS if split != "train"}
    shared = contamination.measure(document_files.documents(_documents(out_dir, "train")), held_out)
    if shared["share"] > config.max_contamination:
        worst = [
            f"{one['id']} ({one['shared']} of {one['runs']})" for s in shared["splits"].values() for one in s["worst"]
        ]
        raise IntegrityError(
            f"{shared['share']:.2%} of the held-out {contamination.WORDS}-word runs also stand in the training text; "
            f"prepare.max_contamination is {config.max_contamination:.2%}; most in {', '.join(worst[:3])}",
            hint="give documents that share text the same `work`, lower prepare.near_duplicate_similarity, or raise "
            "prepare.max_contamination",
        )
    return shared


def _documents(out_dir: Path, split: str) -> Path:
    return out_dir / "documents" / f"{split}.jsonl.zst"


def _texts(out_dir: Path, split: str) -> Iterator[str]:
    return (document.text for document in document_files.documents(_documents(out_dir, split)))


def _duplicates(first_of_cluster: list[int], counts: DocumentCounts) -> dict[str, int]:
    sizes: dict[int, int] = {}
    for first in first_of_cluster:
        sizes[first] = sizes.get(first, 0) + 1
    return {
        "exact": counts.reasons().get("exact duplicate", 0),
        "near": counts.reasons().get("near duplicate", 0),
        "near_clusters": sum(size > 1 for size in sizes.values()),
        "largest_near_cluster": max(sizes.values()),
    }


def _summary(
    index: dict[str, Any], counts: DocumentCounts, shared: dict[str, Any], quarantined: int, data_hash: str
) -> Summary:
    return {
        "data": data_hash,
        "vocab_size": index["vocab_size"],
        "sequence_length": index["sequence_length"],
        "contamination": shared["share"],
        **{f"{split}_tokens": index["splits"][split]["tokens"] for split in SPLITS},
        **{f"{split}_documents": index["splits"][split]["documents"] for split in SPLITS},
        **{f"{split}_bytes": index["splits"][split]["bytes"] for split in SPLITS},
        "dropped": counts.reasons(),
        "quarantined": quarantined,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
