"""Whether a model that training starts from means the same tokens as the corpus. Imports no torch: plans ask it too."""

from __future__ import annotations

from pathlib import Path

from pipelines.core.errors import ConfigError

TOKENIZER = "tokenizer.json"
_SHOWN = 3


def refuse_other_tokens(folder: Path, tokenizer: Path) -> None:
    """Refuse a model whose tokenizer gives a token another id than the one that packed the corpus.

    Args:
        folder: model folder.
        tokenizer: folder of the tokenizer that packed the corpus.

    Raises:
        ConfigError: naming tokens.
    """
    theirs, ours = vocabulary(folder), vocabulary(tokenizer)
    if theirs == ours:
        return
    tokens = sorted(t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
    shown = [f"{token!r} is {theirs.get(token)} there and {ours.get(token)} here" for token in tokens]
    raise ConfigError(
        f"base.from: the model was trained with another tokenizer: {some(shown)}",
        hint="prepare.tokenizer=init_weights takes the model's; or use the corpus and the prepare settings that it had",
    )


def vocabulary(folder: Path) -> dict[str, int]:
    """Return token -> id of the tokenizer in a folder.

    Raises:
        ConfigError: there is none.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise ConfigError(
            f"base.from: {folder} has no {TOKENIZER}, so its tokens cannot be compared with the corpus's",
            hint="save the model's tokenizer beside its weights",
        )
    found: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    return found


def some(problems: list[str]) -> str:
    """Return the first few problems in one line, and how many more there are."""
    more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
