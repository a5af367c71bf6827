"""Duplicates: signatures estimate the Jaccard similarity, planted copies are found, and unique documents stay."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data import dedup
from pipelines.data.clean import words
from pipelines.data.config import PrepareConfig
from pipelines.data.shingles import hash_runs, hash_words

DEFAULT = PrepareConfig()


def sign(texts: list[str], permutations: int = DEFAULT.permutations, seed: int = 1) -> dedup.Signatures:
    return np.stack(
        [
            dedup.signature(hash_words(words(text)), shingle_words=5, permutations=permutations, seed=seed)
            for text in texts
        ]
    )


def change(text: str, fraction: float, vocabulary: list[str], seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(vocabulary) if rng.random() < fraction else word for word in text.split())


def jaccard(one: str, other: str) -> float:
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words(one), words(other)))
    return len(a & b) / len(a | b)


def test_a_signature_estimates_the_jaccard_similarity_of_the_shingles(
    make_documents: Callable[..., list[dict[str, Any]]], vocabulary: list[str]
) -> None:
    base = make_documents(1, words=600)[0]["text"]
    for seed, fraction in enumerate((0.0, 0.02, 0.05, 0.1, 0.3, 1.0)):
        other = change(base, fraction, vocabulary, seed)
        first, second = sign([base, other], permutations=1024)
        assert (first == second).mean() == pytest.approx(jaccard(base, other), abs=0.07)


def test_planted_exact_copies_are_all_found(make_documents: Callable[..., list[dict[str, Any]]]) -> None:
    texts = [record["text"] for record in make_documents(300)]
    planted = random.Random(0).choices(range(300), k=60)
    found = dedup.clusters(sign(texts + [texts[i] for i in planted]), 1.0)
    assert found == [*range(300), *planted]


def test_near_copies_are_found_and_unique_documents_are_not_taken_for_copies(
    make_documents: Callable[..., list[dict[str, Any]]], vocabulary: list[str]
) -> None:
    texts = [record["text"] for record in make_documents(1000, words=300)]
    planted = random.Random(1).sample(range(1000), 200)
    copies = [change(texts[i], 0.05, vocabulary, i) for i in planted]
    found = dedup.clusters(sign(texts + copies), DEFAULT.near_duplicate_similarity)
    recall = np.mean([found[1000 + n] == original for n, original in enumerate(planted)])
    wrong = np.mean([found[i] != i for i in range(1000)])
    assert recall >= 0.9
    assert wrong <= 0.01


@given(st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=14))
def test_the_pairs_connect_exactly_what_comparing_all_candidate_pairs_connects(rows: list[list[int]]) -> None:
    """Reference: every pair that shares a band and is alike enough. Leaders may skip pairs, never connections."""
    signatures = np.array(rows, dtype=np.uint32)
    reference = dedup.Clusters(len(rows))
    for later in range(len(rows)):
        for earlier in range(later):
            same = signatures[earlier] == signatures[later]
            if (same[:4].all() or same[4:].all()) and same.mean() >= 0.75:
                reference.join(earlier, later)
    found = dedup.clusters(signatures, 0.75)
    assert all(reference.find(first) == reference.find(member) for member, first in enumerate(found))


def test_every_copy_of_a_bucket_joins_its_leader() -> None:
    signatures = np.repeat(np.arange(3, dtype=np.uint32), 5)[:, None].repeat(8, axis=1)
    assert dedup.clusters(signatures, 1.0) == [0] * 5 + [5] * 5 + [10] * 5


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_clusters_are_the_connected_components_named_by_their_smallest_member(
    size: int, joins: list[tuple[int, int]]
) -> None:
    joins = [(a % size, b % size) for a, b in joins]
    sets = dedup.Clusters(size)
    component = list(range(size))
    for one, other in joins:
        sets.join(one, other)
        old, new = max(component[one], component[other]), min(component[one], component[other])
        component = [new if name == old else name for name in component]
    assert [sets.find(member) for member in range(size)] == component


@given(st.lists(st.sampled_from(["a", "b", "ab", "c"]), min_size=1, max_size=30), st.integers(1, 6))
def test_runs_hash_equal_exactly_where_their_words_are_equal(letters: list[str], size: int) -> None:
    hashes = hash_runs(hash_words(letters), size)
    runs = [tuple(letters[i : i + size]) for i in range(max(len(letters) - size + 1, 1))]
    assert len(hashes) == len(runs)
    assert [[a == b for a in runs] for b in runs] == (hashes[:, None] == hashes[None, :]).tolist()


def test_an_empty_text_has_a_signature_too() -> None:
    assert sign([""]).shape == (1, DEFAULT.permutations)
