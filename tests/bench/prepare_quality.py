"""What the preparation does to the planted corpus: recall and loss of every step, for bench and test."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipelines.core.stage import StageContext
from pipelines.data import document_files, stage, versioning
from pipelines.data.clean import words
from pipelines.data.config import PrepareConfig
from pipelines.data.contamination import measure
from tests.bench.planted_corpus import Maker, Planted

RULES: list[dict[str, Any]] = [
    {"name": "characters"},
    {"name": "repetition"},
    {"name": "c4"},
    {"name": "fineweb"},
    {"name": "gopher", "stop_words": []},
]
"""For every document, junk or clean: what a team would choose for pages of the web in several languages."""


def run(planted: Planted, folder: Path, **settings: Any) -> tuple[dict[str, Any], float]:
    """Prepare the corpus and return what became of what was planted, and the seconds of processor time.

    Args:
        planted: the corpus.
        folder: an empty one, for the corpus and the result.
        settings: of prepare.
    """
    shard = folder / "corpus" / "planted.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_text("".join(json.dumps(record) + "\n" for record in planted.records), encoding="utf-8")
    items = folder / "items.jsonl"
    items.write_text("".join(json.dumps({"question": item}) + "\n" for item in planted.items), encoding="utf-8")
    config = PrepareConfig.model_validate(
        {"vocab_size": 512, "sequence_length": 64, "workers": 1, "decontaminate": [str(items)], **settings}
    )
    files = versioning.hash_files(shard.parent)
    out = folder / "out"
    out.mkdir()
    began = time.process_time()
    corpus = versioning.Corpus(shard.parent, versioning.hash_tree(files), files)
    stage.prepare(corpus, config, out, StageContext("prepare", folder / "scratch"))
    return outcome(planted, out), time.process_time() - began


def outcome(planted: Planted, out: Path) -> dict[str, Any]:
    """Return the shares of what was planted that were found, and of what is clean that was lost."""
    sides = {
        split: {d.id: d for d in document_files.documents(out / "documents" / f"{split}.jsonl.zst")}
        for split in ("train", "validation", "test")
    }
    train, stays = sides["train"], {name for side in sides.values() for name in side}
    held_out = {split: list(side.values()) for split, side in sides.items() if split != "train"}
    texts = {record["id"]: record["text"] for record in planted.records}
    kinds: dict[str, list[bool]] = defaultdict(list)
    for name, kind in planted.junk.items():
        kinds[kind].append(name in stays)
    near: dict[str, list[bool]] = defaultdict(list)
    for copy, original, language in planted.near:
        if similarity(texts[copy], texts[original]) >= 0.5:
            near[language].append(not {copy, original} <= stays)
    verbatim: dict[str, list[bool]] = defaultdict(list)
    edited: dict[str, list[bool]] = defaultdict(list)
    trained = {name: squeezed(train[name].text) for name in train if name in planted.verbatim or name in planted.edited}
    for name, item in planted.verbatim.items():
        if name not in held_out_names(held_out):
            verbatim[planted.items[item]].append(squeezed(item) not in trained.get(name, ""))
    for name, (item, text) in planted.edited.items():
        if name not in held_out_names(held_out):
            edited[planted.items[item]].append(squeezed(text) not in trained.get(name, ""))
    changed = [name for name in planted.unique if name in train and train[name].text != texts[name]]
    lost = [name for name in planted.unique if name not in stays]
    return {
        "junk kept by kind": {kind: sum(kept) / len(kept) for kind, kept in sorted(kinds.items())},
        "junk kept": sum(map(sum, kinds.values())) / len(planted.junk),
        "unique lost": len(lost) / len(planted.unique),
        "unique cut": len(changed) / len(planted.unique),
        "near recall": shares(near),
        "verbatim recall": shares(verbatim),
        "edited recall": shares(edited),
        "13-word runs left": measure(train.values(), held_out)["share"],
        "lost": lost[:5],
    }


def held_out_names(held_out: dict[str, list[Any]]) -> set[str]:
    """Return the ids of held-out documents: evaluation items are removed from the training text alone."""
    return {document.id for side in held_out.values() for document in side}


def shares(found: dict[str, list[bool]]) -> dict[str, float]:
    """Return the share of each language, and the one over all."""
    everything = [one for each in found.values() for one in each]
    return {name: sum(each) / len(each) for name, each in sorted(found.items())} | {
        "all": sum(everything) / len(everything)
    }


def squeezed(text: str) -> str:
    """Return a text without blanks."""
    return "".join(text.split())


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity of the runs of five units, by sets of tuples."""
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words(one), words(other)))
    return len(a & b) / len(a | b)


def references(folder: Path, count: int, seed: int) -> Path:
    """Write clean texts of every language that are not in the corpus, as a user's reference for `quality`."""
    from tests.bench.planted_corpus import LEXICONS

    maker = Maker(seed)
    languages = list(LEXICONS)
    path = folder / "reference.jsonl"
    texts = (maker.text(one, maker.sentences(one, 12)) for one in (languages[n % len(languages)] for n in range(count)))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
