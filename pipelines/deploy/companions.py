"""What lies beside exported weights, so that other programs use a model as it was trained.

Training and evaluation call a model with token ids that they made themselves: documents begin with the start token, no
row is padded on the left, and nothing is generated. Programs that are given text rely on the folder to say all that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.core.artifact import read_json
from pipelines.data import tokenizer as tokenizer_of_corpus
from pipelines.modelio.folder import family_in, write_json

CARD = "README.md"
"""Where Hugging Face looks for a model card."""
ORIGINAL_CARD = "README.original.md"
"""The card that a model from elsewhere came with."""


def finish(folder: Path, card: str) -> None:
    """Complete an exported folder: its card, a cache for generation, and a tokenizer that does as training did.

    Args:
        folder: with config.json and the tokenizer; changed in place.
        card: model card, Markdown.
    """
    config = _read(folder / "config.json")
    decoder = family_in(config) == "decoder"
    if decoder:
        write_json(folder / "config.json", config | {"use_cache": True})
        generation = folder / "generation_config.json"
        write_json(generation, (_read(generation) if generation.is_file() else {}) | {"use_cache": True})
    _finish_tokenizer(folder, config, decoder=decoder)
    theirs = folder / CARD
    if theirs.is_file():
        theirs.rename(folder / ORIGINAL_CARD)
    theirs.write_text(card, encoding="utf-8")


def _finish_tokenizer(folder: Path, config: dict[str, Any], *, decoder: bool) -> None:
    """Have the tokenizer put the start token before a text (and the end token after it, for an encoder).

    A special token that a text spells out is text, as it was in training: `split_special_tokens`.
    A decoder's rows are padded on the left: it goes on from the last token, which must not be padding; one whose
    tokenizer has no padding token is padded with its end token. Nothing else is changed in a tokenizer of others.
    """
    path = folder / "tokenizer_config.json"
    settings = _read(path) if path.is_file() else {}
    settings |= {"padding_side": "left" if decoder else settings.get("padding_side", "right")}
    ours = settings.get("bos_token") == tokenizer_of_corpus.BOS
    if ours:
        settings |= {"model_max_length": config["max_position_embeddings"], "split_special_tokens": True}
    elif decoder and not settings.get("pad_token") and settings.get("eos_token"):
        settings |= {"pad_token": settings["eos_token"]}
    write_json(path, settings)
    if not ours:
        return
    tokenizer = _read(folder / "tokenizer.json")
    first, last = str(settings.get("bos_token")), str(settings.get("eos_token"))
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    present = tokenizer.get("post_processor") or {"special_tokens": {}}
    if not set(present.get("special_tokens", {"?"})) <= {first} or first not in ids or last not in ids:
        return  # a tokenizer of others', which knows what it does
    around = [_special(first), *([] if decoder else [_special(last)])]
    single = [around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1:]]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}, *around[1:]],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (first, last)},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(path)
    return value
