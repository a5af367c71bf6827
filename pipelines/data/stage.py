"""The prepare stage: from the corpus that DVC names to documents, a tokenizer and packed sequences, by split.

Six steps, each a stream from disk to disk: survey (read, clean, filter, drop copies), deduplicate (documents, then
passages), split, remove held-out text and evaluation items from the training text, train the tokenizer, pack. The same
corpus and configuration give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import project
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.data import (
    contamination,
    dedup,
    document_files,
    evaluation_items,
    passages,
    reader,
    sequences,
    tokenizer,
    tokenizer_files,
    versioning,
)
from pipelines.data.config import TOKENIZER_WORDS, PrepareConfig, PrepareJob
from pipelines.data.records import Document
from pipelines.data.report import DocumentCounts
from pipelines.data.split import SPLITS, assign, group_names
from pipelines.data.survey import QUARANTINE, Survey, fit_rules, survey

TOKENIZER = "tokenizer"
REPORT = "report.json"
_STEPS = ("survey", "deduplicate", "split", "contamination", "tokenizer", "pack")


def run(config: PrepareJob, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Prepare the corpus; see the module for the steps and `tokenizer/`, `index.json`, `report.json` for the result.

    Raises:
        IntegrityError: the corpus is not the one that data.dvc names, is empty, has too many malformed records, or is
            too small to be split or packed.
        DataRefused: the training text holds held-out text or evaluation items, and the recipe says to refuse that.
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
        DataRefused: see `contamination.refuse`.
    """
    context.scratch.mkdir(parents=True, exist_ok=True)
    items = evaluation_items.load(config.decontaminate)
    counts = DocumentCounts()
    say = _announcer(context)
    fit_rules(config, lambda: _texts_read(corpus, config), context.scratch)
    records = reader.read(corpus.path, config, md5=corpus.md5)
    surveyed = survey(records, context.scratch, config, counts, lambda done: say(0, f"{done} documents"))
    if not surveyed.works:
        raise IntegrityError(
            f"no document is left of the corpus; dropped: {counts.reasons() or 'none, it is empty'}",
            hint="check the thresholds in the section prepare, and the corpus with `ingot data status`",
        )
    say(1, f"{len(surveyed.works)} documents to compare")
    near = dedup.near_duplicates(
        surveyed.signatures, surveyed.shingles, surveyed.lengths, config.near_duplicate_similarity
    )
    repeated = _repeated(surveyed, near, config)
    say(2, "dividing works among splits")
    groups, pairs = _split(surveyed, near, repeated, config, out_dir, context.scratch, counts)
    say(3, "comparing held-out with training text")
    shared = _contamination(out_dir, context.scratch, items, config, counts)
    say(
        4, f"{counts.documents('train')} documents to learn from, which held {shared['share']:.2%} of the held-out text"
    )
    if tokenizer_of is not None:
        trained = tokenizer.load(tokenizer_of, may_grow=config.tokenizer != "init_weights")
    else:
        how = config.tokenizer_training
        sample = tokenizer.training_sample(_texts(out_dir, "train"), counts.bytes("train"), how, config.seed)
        trained = tokenizer.train(sample, config.vocab_size, how)
    if tokenizer_of is not None and config.tokenizer == "init_weights":
        tokenizer_files.copy(tokenizer_of, out_dir / TOKENIZER)
    else:
        trained.save(out_dir / TOKENIZER, config.sequence_length)
    say(5, f"{trained.vocab_size} tokens in the vocabulary")
    index = sequences.write(trained, out_dir, config, counts)
    duplicates = _duplicates(near, counts) | {"pairs": pairs}
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


def _texts_read(corpus: versioning.Corpus, config: PrepareConfig) -> Iterator[str]:
    records = reader.read(corpus.path, config)
    return (record.text for record in records if isinstance(record, Document))


def _kept(surveyed: Survey, near: dedup.NearDuplicates) -> Iterator[tuple[int, Document]]:
    """Yield the documents that stay, with their numbers."""
    for number, document in enumerate(document_files.documents(surveyed.documents)):
        if near.kept[number] == number:
            yield number, document


def _repeated(surveyed: Survey, near: dedup.NearDuplicates, config: PrepareConfig) -> passages.Repeated | None:
    """Find the passages that several documents hold; None where they are left alone."""
    settings = config.repeated_passages
    if not settings.words:
        return None
    numbers = (marks for n, marks in enumerate(surveyed.fingerprints.documents()) if near.kept[n] == n)
    suspects = passages.Known(passages.of_several(numbers))
    suspicious = {n for n, marks in enumerate(surveyed.fingerprints.documents()) if suspects.places(marks)[1].any()}
    repeated = passages.Repeated(settings.words, by_source=settings.scope == "source", suspects=suspects)
    repeated.learn(document for number, document in _kept(surveyed, near) if number in suspicious)
    return repeated


def _split(
    surveyed: Survey,
    near: dedup.NearDuplicates,
    repeated: passages.Repeated | None,
    config: PrepareConfig,
    out_dir: Path,
    scratch: Path,
    counts: DocumentCounts,
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Write the documents by split, without near-duplicates and repeated passages; the training text to `scratch`.

    Returns:
        The number of groups per split, and sampled pairs of near-duplicates.
    """
    links = ((surveyed.works[kept], work) for kept, work in zip(near.kept, surveyed.works, strict=True))
    group_of = group_names(surveyed.works + [later for _, later in surveyed.links], [*surveyed.links, *links])
    sizes = Counter[str]()
    for number, (work, length) in enumerate(zip(surveyed.works, surveyed.lengths, strict=True)):
        sizes[group_of[work]] += length if near.kept[number] == number else 0
    side_of = assign(sizes, config, sizes)
    pairs = dedup.PairSamples(near)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                document_files.DocumentWriter(_documents(scratch if split == "train" else out_dir, split))
            )
            for split in SPLITS
        }
        for number, document in enumerate(document_files.documents(surveyed.documents)):
            pairs.see(number, document)
            if near.kept[number] != number:
                counts.drop(document, "near duplicate")
                continue
            left = _without_repeated(document, repeated, config, counts)
            if left is None:
                continue
            split = side_of[group_of[document.work]]
            writers[split].write(left)
            if split != "train":
                counts.keep(left, split)
    _refuse_few(counts, config)
    return {split: sum(side == split for side in side_of.values()) for split in SPLITS}, pairs.rows()


def _refuse_few(counts: DocumentCounts, config: PrepareConfig) -> None:
    """Refuse held-out splits of fewer documents than anything can be measured on."""
    for split in ("validation", "test"):
        if (found := counts.documents(split)) < config.min_held_out_documents:
            raise IntegrityError(
                f"the {split} split has {found} {'document' if found == 1 else 'documents'}, "
                f"prepare.min_held_out_documents asks for {config.min_held_out_documents}",
                hint=f"raise prepare.{split}_fraction, add documents, or give independent ones a `work` of their own",
            )


def _without_repeated(
    document: Document, repeated: passages.Repeated | None, config: PrepareConfig, counts: DocumentCounts
) -> Document | None:
    """Return a document without passages that an earlier one holds; None where too little is left."""
    cut = repeated.cut(document) if repeated else None
    if cut is None:
        return document
    if len(cut.kept.strip()) < config.min_characters:
        counts.drop(document, "repeated passages", cut.removed[0])
        return None
    counts.cut(
        document, "repeated passages", len(document.text.encode()) - len(cut.kept.encode()), max(cut.removed, key=len)
    )
    return dataclasses.replace(document, text=cut.kept)


def _contamination(
    out_dir: Path, scratch: Path, items: evaluation_items.Items, config: PrepareConfig, counts: DocumentCounts
) -> dict[str, Any]:
    """Write the training text without what it shares with held-out text and evaluation items; return what that was."""
    held_out = {split: document_files.documents(_documents(out_dir, split)) for split in SPLITS if split != "train"}
    found = contamination.Contamination(held_out, items)
    done = contamination.Cleansed(config.contamination.action)
    train = document_files.documents(_documents(scratch, "train"))
    with document_files.DocumentWriter(_documents(out_dir, "train")) as writer:
        for document in contamination.cleanse(train, found, config, counts, done):
            writer.write(document)
            counts.keep(document, "train")
    report = found.report() | {"removed": dataclasses.asdict(done)}
    if config.contamination.action == "refuse":
        contamination.refuse(report, config)
    if not counts.documents("train"):
        raise IntegrityError(
            "every training document shares text with the held-out documents or the evaluation sets",
            hint="give documents that share text the same `work`; see report.json for samples",
        )
    return report


def _documents(out_dir: Path, split: str) -> Path:
    return out_dir / "documents" / f"{split}.jsonl.zst"


def _texts(out_dir: Path, split: str) -> Iterator[str]:
    return (document.text for document in document_files.documents(_documents(out_dir, split)))


def _duplicates(near: dedup.NearDuplicates, counts: DocumentCounts) -> dict[str, Any]:
    sizes = Counter(near.kept)
    return {
        "exact": counts.reasons().get("exact duplicate", 0),
        "near": counts.reasons().get("near duplicate", 0),
        "near_clusters": sum(size > 1 for size in sizes.values()),
        "largest_near_cluster": max(sizes.values()),
    }


def _summary(
    index: dict[str, Any], counts: DocumentCounts, shared: dict[str, Any], quarantined: int, data_hash: str
) -> Summary:
    packed = index["splits"]["train"].get("sources")
    sources = {} if packed is None else {"sources": {each["source"]: each["sequences"] for each in packed}}
    return {
        "data": data_hash,
        "vocab_size": index["vocab_size"],
        "sequence_length": index["sequence_length"],
        "contamination": shared["share"],
        **{f"{split}_tokens": index["splits"][split]["tokens"] for split in SPLITS},
        **{f"{split}_documents": index["splits"][split]["documents"] for split in SPLITS},
        **{f"{split}_bytes": index["splits"][split]["bytes"] for split in SPLITS},
        **sources,
        "dropped": counts.reasons(),
        "lost_bytes": counts.lost_bytes(),
        "quarantined": quarantined,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
