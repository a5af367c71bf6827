"""A tokenizer that was trained elsewhere, as files: where they are, and the digest that they enter an identity by."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.core import fingerprint
from pipelines.core.errors import ConfigError

FILE = "tokenizer.json"
_FILES = (FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
          "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # fmt: skip
"""What transformers saves of tokenizers."""


_TEMPLATE = "chat_template.jinja"


def place_of(folder: Path) -> Path:
    """Return where the tokenizer of a folder lies: itself, or what an artifact of prepare or of a training has it in.

    Raises:
        ConfigError: there is none.
    """
    for place in (folder, folder / "tokenizer", folder / "model"):
        if any((place / name).is_file() for name in _FILES):
            return place
    raise ConfigError(
        f"{folder} has no {FILE} and nothing else that transformers reads as a tokenizer",
        hint="name a folder that a tokenizer of transformers was saved in, or set prepare.tokenizer = train",
    )


def copy(folder: Path, target: Path) -> None:
    """Copy the tokenizer of a model file by file: what is measured with it must find the very same.

    Args:
        folder: of the model.
        target: created.

    Raises:
        ConfigError: there is none, or only one that is not in `tokenizer.json`.
    """
    place = place_of(folder)
    if not (place / FILE).is_file():
        raise ConfigError(
            f"{place} has no {FILE}",
            hint="save its fast tokenizer beside it: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    target.mkdir(parents=True)
    for name in (*_FILES, _TEMPLATE):
        if (place / name).is_file():
            shutil.copyfile(place / name, target / name)


def digest(folder: Path) -> str:
    """Return the sha256 over the files of the tokenizer in a folder: the same wherever it lies.

    Raises:
        ConfigError: there is none.
    """
    place = place_of(folder)
    return fingerprint.digest(
        {name: fingerprint.hash_file(place / name) for name in _FILES if (place / name).is_file()}
    )
