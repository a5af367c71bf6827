"""Splits: which documents train, which validate, which test.

A group (a work, or several works that share a near-duplicate) is never divided. Its side follows from a hash of the
seed and its name alone, so it stays where it is when the corpus grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pipelines.core.errors import IntegrityError
from pipelines.data.config import PrepareConfig
from pipelines.data.dedup import Clusters

SPLITS = ("train", "validation", "test")


def group_names(works: Iterable[str], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the group of every work: works that share a (near-)duplicate are one group, named by its first work.

    Args:
        works: every work, in any order, repeated or not.
        links: pairs of works that share a document or a near-duplicate.
    """
    names = sorted(set(works))
    number = {name: index for index, name in enumerate(names)}
    linked = Clusters(len(names))
    for one, other in links:
        linked.join(number[one], number[other])
    return {name: names[linked.find(index)] for index, name in enumerate(names)}


def assign(groups: Iterable[str], config: PrepareConfig) -> dict[str, str]:
    """Return group -> split. Every split gets at least one group, whatever the hashes say.

    Raises:
        IntegrityError: fewer than three groups, so that no three-way split exists.
    """
    place = {group: _place(group, config.seed) for group in set(groups)}
    ranked = sorted(place, key=lambda group: (place[group], group))
    if len(ranked) < len(SPLITS):
        raise IntegrityError(
            f"the corpus has {len(ranked)} group(s) of documents; train, validation and test need one each",
            hint="add works, or give documents that are independent of each other a `work` of their own",
        )
    tests = max(sum(place[group] < config.test_fraction for group in ranked), 1)
    held_out = sum(place[group] < config.test_fraction + config.validation_fraction for group in ranked)
    held_out = min(max(held_out, tests + 1), len(ranked) - 1)
    tests = min(tests, held_out - 1)
    sides = ["test"] * tests + ["validation"] * (held_out - tests) + ["train"] * (len(ranked) - held_out)
    return dict(zip(ranked, sides, strict=True))


def _place(group: str, seed: int) -> float:
    """Return where the hash puts the group in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
