"""Duplicates: signatures estimate the Jaccard similarity, planted copies are found, and unique documents stay."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data import dedup
from pipelines.data.clean import words
from pipelines.data.config import PrepareConfig
from pipelines.data.shingles import hash_runs, hash_words, units_of

DEFAULT = PrepareConfig()


def sets(texts: list[str]) -> list[dedup.Shingles]:
    return [dedup.shingles(units_of(text).hashes, 5) for text in texts]


def sign(texts: list[str], permutations: int = DEFAULT.permutations, seed: int = 1) -> dedup.Signatures:
    return np.stack([dedup.signature(found, permutations=permutations, seed=seed) for found in sets(texts)])


def find(folder: Path, texts: list[str], similarity: float = DEFAULT.near_duplicate_similarity) -> dedup.NearDuplicates:
    """Near-duplicates as the stage finds them, the shingles in a file."""
    found = sets(texts)
    (folder / "shingles").write_bytes(b"".join(each.tobytes() for each in found))
    file = dedup.ShingleFile(folder / "shingles", [len(each) for each in found])
    return dedup.near_duplicates(sign(texts), file, [len(text) for text in texts], similarity)


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


def test_planted_exact_copies_are_all_found(
    tmp_path: Path, make_documents: Callable[..., list[dict[str, Any]]]
) -> None:
    texts = [record["text"] for record in make_documents(300)]
    planted = random.Random(0).choices(range(300), k=60)
    assert find(tmp_path, texts + [texts[i] for i in planted], 1.0).kept == [*range(300), *planted]


def test_near_copies_are_found_and_unique_documents_are_not_taken_for_copies(
    tmp_path: Path, make_documents: Callable[..., list[dict[str, Any]]], vocabulary: list[str]
) -> None:
    texts = [record["text"] for record in make_documents(600, words=300)]
    planted = random.Random(1).sample(range(600), 200)
    copies = [change(texts[i], 0.05, vocabulary, i) for i in planted]
    found = find(tmp_path, texts + copies).kept
    recall = np.mean([found[600 + n] == original or found[original] == 600 + n for n, original in enumerate(planted)])
    assert recall >= 0.98
    assert all(found[i] == i for i in range(600) if i not in planted)


def test_every_dropped_document_has_a_partner_that_stays_and_the_longest_stays(
    tmp_path: Path, make_documents: Callable[..., list[dict[str, Any]]], vocabulary: list[str]
) -> None:
    """A chain of documents, each a little unlike the one before: the ends have nothing in common, and both stay."""
    chain = [make_documents(1, words=200)[0]["text"]]
    for step in range(30):
        words_ = chain[-1].split()
        words_[5 * step : 5 * step + 12] = random.Random(step).choices(vocabulary, k=12 + step % 3)
        chain.append(" ".join(words_))
    found = find(tmp_path, chain)
    dropped = [n for n, kept in enumerate(found.kept) if kept != n]
    assert dropped
    for n in dropped:
        partner = found.kept[n]
        assert found.kept[partner] == partner
        assert found.similarity[n] == pytest.approx(jaccard(chain[n], chain[partner]))
        assert found.similarity[n] >= 0.5
        assert len(chain[partner]) >= len(chain[n])
    assert len({found.kept[n] for n in range(len(chain))}) > 2


def test_a_pair_just_below_the_threshold_stays(
    tmp_path: Path, make_documents: Callable[..., list[dict[str, Any]]], vocabulary: list[str]
) -> None:
    base = make_documents(1, words=400)[0]["text"]
    others = [change(base, fraction, vocabulary, seed) for seed in range(40) for fraction in (0.10, 0.12, 0.14, 0.16)]
    for other in others:
        near = find(tmp_path, [base + " and", other]).kept[1] == 0
        similarity = jaccard(base + " and", other)
        assert similarity >= 0.5 if near else similarity < 0.56


def test_bands_propose_a_pair_at_the_threshold_nearly_always() -> None:
    assert dedup.rows_per_band(0.5, 128) == 3
    assert dedup.rows_per_band(0.8, 128) == 7
    assert dedup.rows_per_band(1.0, 128) == 127


LANGUAGES = {
    "Hindi": ("0915", "0939", ("093e", "093f", "0940", "0947"), 3, " "),
    "Chinese": ("4e00", "6e00", (), 1, ""),
    "Japanese": ("3042", "3093", (), 1, ""),
    "Thai": ("0e01", "0e2e", ("0e31", "0e34", "0e35"), 3, ""),
    "Arabic": ("0627", "064a", (), 4, " "),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_near_copies_are_found_in_every_script(tmp_path: Path, language: str) -> None:
    """Five percent of the words are others in the copy; words are made of letters, and marks where there are any."""
    first, last, marks, letters, space = LANGUAGES[language]
    rng = random.Random(language)
    alphabet = [chr(n) for n in range(int(first, 16), int(last, 16))]
    signs = ["", *(chr(int(mark, 16)) for mark in marks)]
    lexicon = ["".join(rng.choice(alphabet) + rng.choice(signs) for _ in range(letters)) for _ in range(2000)]
    originals = [[rng.choice(lexicon) for _ in range(200)] for _ in range(60)]
    copies = []
    for text in originals:
        changed = set(rng.sample(range(200), 10))
        copies.append([rng.choice(lexicon) if n in changed else word for n, word in enumerate(text)])
    found = find(tmp_path, [space.join(text) for text in (*originals, *copies)]).kept
    assert np.mean([60 + n == found[n] or found[60 + n] == n for n in range(60)]) >= 0.95
    assert all(found[n] in {n, 60 + n} for n in range(60))


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
