"""Splits: which documents train, which validate, which test.

A group (a work, or several works that share a near-duplicate) is never divided. Its side follows from a hash of the
seed and its name alone, so it stays where it is when the corpus grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

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


def assign(groups: Iterable[str], config: PrepareConfig, sizes: Mapping[str, int] | None = None) -> dict[str, str]:
    """Return group -> split. Every split gets at least one group, whatever the hashes say.

    Args:
        groups: names, in any order, repeated or not.
        config: shares and bounds.
        sizes: characters of each group; what is beyond `config.max_held_out_characters` of a side trains.

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
    sides = {
        **_bounded("test", ranked[:tests], config, sizes),
        **_bounded("validation", ranked[tests:held_out], config, sizes),
    }
    return {group: sides.get(group, "train") for group in ranked}


def _bounded(
    side: str, ranked: Sequence[str], config: PrepareConfig, sizes: Mapping[str, int] | None
) -> dict[str, str]:
    """Return the groups of a held-out side, the first ones as far as its bound lets them, and at least one."""
    most, total = config.max_held_out_characters, 0
    found: dict[str, str] = {}
    for group in ranked:
        total += 0 if sizes is None else sizes.get(group, 0)
        if most is not None and total > most and found:
            break
        found[group] = side
    return found


def _place(group: str, seed: int) -> float:
    """Return where the hash puts the group in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
