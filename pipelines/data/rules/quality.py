"""A quality classifier that is trained on the fly: does a text look like the reference set, or like the rest?

Logistic regression on hashed words and pairs of words, as fastText has them (Joulin et al. 2017), trained in numpy on a
reference set that the user gives against a sample of the corpus, or against a set of bad texts. The threshold is where
a given share of reference texts of the same length, that were not trained on, would be lost.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipelines.core import fingerprint
from pipelines.core.errors import IntegrityError
from pipelines.core.settings import NOT_IDENTITY, PATH, absolute
from pipelines.data.rules import base
from pipelines.data.rules.base import Page, RuleConfig
from pipelines.data.shingles import Hashes, hash_runs, units_of

_BUCKETS = 1 << 18
_UNITS = 1000
"""Units from the start of a text that are looked at."""
_LENGTHS = (20, 40, 80, 160, 320, 640)
"""Units that a text is cut to, the most of which it has, before it is judged; shorter texts are not."""
_EPOCHS = 8
_RATE = 0.5
_FEWEST = 50
"""Texts without which nothing can be learned."""
_FILES = (".jsonl", ".txt")

Features = NDArray[np.int64]


class QualityConfig(RuleConfig):
    """What is good, and how much of it may be lost."""

    reference: str = Field(
        default="",
        description="File of good texts: .jsonl with `text`, or .txt with a text a line.",
        json_schema_extra=NOT_IDENTITY | PATH,
    )
    against: str = Field(
        default="",
        description="File of bad texts of the same kind; none: a sample of the corpus.",
        json_schema_extra=NOT_IDENTITY | PATH,
    )
    lost: float = Field(0.005, gt=0, le=0.5, description="Share of the reference texts that the threshold would lose.")
    sample: int = Field(5000, ge=_FEWEST, description="Texts of each side that are trained on at most.")
    seed: int = Field(0, ge=0, description="Seed of the samples and of the order of training.")
    sha256: tuple[str, ...] = Field(
        (), description="Of the files; found when the recipe is read, and checked where it is given."
    )

    @classmethod
    def placed(cls, table: dict[str, Any], start: Path | None) -> dict[str, Any]:
        """Return a table with absolute paths."""
        return table | {key: absolute(table[key], start) for key in ("reference", "against") if table.get(key)}

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, table: Any) -> Any:
        if not isinstance(table, Mapping):
            return table
        if not table.get("reference"):
            raise ValueError("the rule `quality` learns what is good from a file: give it a `reference`")
        actual = []
        for key in ("reference", "against"):
            if path := table.get(key):
                if not Path(path).is_file() or Path(path).suffix not in _FILES:
                    raise ValueError(f"{key}: {path} is no file that ends in {' or '.join(_FILES)}")
                actual.append(fingerprint.hash_file(Path(path)))
        if table.get("sha256") and list(table["sha256"]) != actual:
            raise ValueError(f"its files have sha256 {actual}, expected {list(table['sha256'])}")
        return {**table, "sha256": actual}


class Rule(base.Rule):
    """Hashed n-gram logistic regression."""

    Config = QualityConfig
    learns = True

    def reason(self, page: Page) -> str | None:
        """Drop a text that looks less like the reference than nearly all of the reference does."""
        weights, biases, thresholds = _loaded(self.learned)
        hashes = page.units.hashes
        fold = _fold(hashes)
        length = max((one for one in thresholds[fold] if one <= len(hashes)), default=0)
        if not length:
            return None
        found = score(features(hashes[:length]), weights[fold], biases[fold])
        return "quality" if found < thresholds[fold][length] else None

    def fit(self, texts: Iterable[str]) -> None:
        """Train against a sample of the corpus, or against the file of bad texts.

        Two classifiers are trained, each on the other texts of half of the sample: a text is judged by the one that
        has not seen it, or it would be recognised as no reference for having been learned by heart.

        Raises:
            IntegrityError: there are too few texts to learn from.
        """
        rng = random.Random(self.settings.seed)
        good = _sampled(_texts(self.settings.reference), self.settings.sample, rng)
        bad = _sampled(_texts(self.settings.against) if self.settings.against else texts, self.settings.sample, rng)
        if min(len(good), len(bad)) < _FEWEST:
            raise IntegrityError(
                f"the rule `quality` has {len(good)} good and {len(bad)} other texts; it needs {_FEWEST} of each",
                hint="give a larger `reference`, or leave the rule out",
            )
        held_out = good[::5]
        trained = [features(one) for n, one in enumerate(good) if n % 5]
        learned = []
        for fold in (0, 1):
            seen = [features(one) for one in bad if _fold(one) != fold]
            weights, bias = train(trained, seen, self.settings.seed)
            learned.append((weights, bias, _thresholds(held_out, weights, bias, self.settings.lost)))
        weights_2V, biases, thresholds = (np.array(each, dtype=np.float32) for each in zip(*learned, strict=True))
        assert self.learned is not None
        with self.learned.open("wb") as file:
            np.savez(file, weights=weights_2V, biases=biases, thresholds=thresholds)


def _thresholds(held_out: list[Hashes], weights: NDArray[np.float32], bias: float, lost: float) -> list[float]:
    """Return for each length the score below which a text of it is dropped; NaN where not nearly all are as long.

    The long texts of several languages are those of some, which say nothing of the others. How far scores scatter
    depends on the length. So a text is cut to one of a few, and judged by the held-out texts cut to the same. A
    quantile of some hundred scores is known but roughly: half of a lost text is taken off.
    """
    found = []
    for length in _LENGTHS:
        scores = sorted(score(features(one[:length]), weights, bias) for one in held_out if len(one) >= length)
        if len(scores) < 0.9 * len(held_out):
            found.append(np.nan)
            continue
        lowest = scores[0] - (scores[len(scores) // 10] - scores[0])  # beyond what so few texts can show
        rank = lost * len(scores) - 0.5
        found.append(min(lowest if rank < 1 else scores[int(rank) - 1], 0.0))
    return found


def _fold(hashes: Hashes) -> int:
    """Return 0 or 1, the same for equal texts."""
    return int(hash_runs(hashes[:_UNITS], _UNITS)[0] >> np.uint64(63))


def features(hashes: Hashes) -> Features:
    """Return the distinct buckets of the words and pairs of words of a text."""
    head = hashes[:_UNITS]
    both = np.concatenate((hash_runs(head, 1), hash_runs(head, 2) ^ np.uint64(1)))
    return np.unique((both >> np.uint64(40)) % np.uint64(_BUCKETS)).astype(np.int64)


def score(buckets: Features, weights: NDArray[np.float32], bias: float) -> float:
    """Return the logarithm of the odds that a text is of the reference."""
    return float(weights[buckets].sum() / np.sqrt(max(len(buckets), 1)) + bias)


def train(good: list[Features], bad: list[Features], seed: int) -> tuple[NDArray[np.float32], float]:
    """Return weights and bias: AdaGrad on the logistic loss, both sides of equal weight."""
    weights, squares = np.zeros(_BUCKETS, dtype=np.float32), np.full(_BUCKETS, 1e-3, dtype=np.float32)
    bias, bias_square = 0.0, 1e-3
    pairs = [(each, 1.0, 0.5 / len(good)) for each in good] + [(each, 0.0, 0.5 / len(bad)) for each in bad]
    scale = len(pairs)
    rng = random.Random(seed)
    for _ in range(_EPOCHS):
        rng.shuffle(pairs)
        for buckets, label, share in pairs:
            error = (1 / (1 + np.exp(-np.clip(score(buckets, weights, bias), -30, 30))) - label) * share * scale
            slope = np.float32(error / np.sqrt(max(len(buckets), 1)))
            squares[buckets] += slope**2
            weights[buckets] -= _RATE * 0.1 * slope / np.sqrt(squares[buckets])
            bias_square += error**2
            bias -= _RATE * 0.1 * error / bias_square**0.5
    return weights, float(bias)


def _sampled(texts: Iterable[str], size: int, rng: random.Random) -> list[Hashes]:
    """Return a reservoir sample of the texts, as the first units of each."""
    chosen: list[str] = []
    for number, text in enumerate(texts):
        if number < size:
            chosen.append(text)
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = text
    return [units_of(text).hashes[:_UNITS] for text in chosen]


def _texts(path: str) -> Iterable[str]:
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield str(json.loads(line)["text"]) if path.endswith(".jsonl") else line


@functools.lru_cache(maxsize=8)
def _loaded(path: Path) -> tuple[NDArray[np.float32], list[float], list[dict[int, float]]]:
    """Return weights, biases, and the thresholds by length."""
    with np.load(path, allow_pickle=False) as stored:
        known = [
            {length: value for length, value in zip(_LENGTHS, row, strict=True) if not np.isnan(value)}
            for row in stored["thresholds"].tolist()
        ]
        return stored["weights"], stored["biases"].tolist(), known
