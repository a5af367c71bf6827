"""Windows, masks and batches: each token is scored once, with the history that is promised."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.measure import windows

CASES = [
    (length, context, stride) for length in (1, 2, 8, 9, 10, 31, 100) for context, stride in ((8, 8), (8, 5), (8, 1))
]


@pytest.mark.parametrize(("length", "context", "stride"), CASES)
def test_causal_windows_score_every_token_but_the_first_exactly_once(length: int, context: int, stride: int) -> None:
    found = windows.causal_windows(length, 0, context, stride)
    scored = [position for window in found for position in window.scored]
    assert scored == list(range(1, length))


@pytest.mark.parametrize(("length", "context", "stride"), CASES)
def test_causal_windows_show_each_token_at_least_the_promised_history(length: int, context: int, stride: int) -> None:
    for window in windows.causal_windows(length, 0, context, stride):
        assert window.length <= context
        for position in window.scored:
            history = position - window.start
            assert history >= min(position, context - stride + 1)
            assert position <= window.start + window.length


def test_masked_windows_score_every_masked_position_exactly_once() -> None:
    masked = windows.mask("a document", 300, 0.15, 0)
    found = windows.masked_windows(0, 64, masked)
    assert [p for window in found for p in window.scored] == list(np.flatnonzero(masked))
    assert sum(window.length for window in found) == 300


def test_masks_are_a_pure_function_of_document_position_and_seed() -> None:
    """Also of nothing else: a longer document keeps the mask of its beginning."""
    base = windows.mask("play/act-1", 500, 0.15, 0)
    np.testing.assert_array_equal(base, windows.mask("play/act-1", 500, 0.15, 0))
    np.testing.assert_array_equal(base[:-1], windows.mask("play/act-1", 900, 0.15, 0)[:499])
    assert (base != windows.mask("play/act-2", 500, 0.15, 0)).any()
    assert (base != windows.mask("play/act-1", 500, 0.15, 1)).any()


def test_masks_hit_the_rate_and_never_the_boundary_tokens() -> None:
    masks = [windows.mask(f"document {i}", 400, 0.15, 0) for i in range(200)]
    share = np.mean([m[1:-1] for m in masks])
    # 79,600 draws of 0.15: the standard error is 0.0013.
    assert abs(share - 0.15) < 4 * 0.0013
    assert not any(m[0] or m[-1] for m in masks)


def test_masks_of_neighbours_are_independent() -> None:
    masked = np.concatenate([windows.mask(f"document {i}", 402, 0.15, 0)[1:-1] for i in range(200)])
    together = np.mean(masked[1:] & masked[:-1])
    assert abs(together - 0.15**2) < 4 * np.sqrt(0.0225 * 0.9775 / len(masked))


def _documents() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(4, 99, size=n).astype(np.int64) for n in (3, 40, 9, 17, 2, 1)]


@pytest.mark.parametrize("batch_tokens", [1, 16, 64, 10_000])
def test_causal_batches_hold_every_scored_token_once_after_its_history(batch_tokens: int) -> None:
    documents = _documents()
    cuts = [w for d, ids in enumerate(documents) for w in windows.causal_windows(len(ids), d, 16, 12)]
    seen: list[tuple[int, int]] = []
    for batch in windows.causal_batches(documents, cuts, batch_tokens):
        assert batch.ids.size <= max(batch_tokens, 16)
        assert batch.shown[batch.rows, batch.columns].all()
        for row, column, target, document in zip(
            batch.rows, batch.columns, batch.targets, batch.documents, strict=True
        ):
            shown = batch.ids[row, : column + 1].tolist()
            ids = documents[document].tolist()
            places = [i for i in range(len(shown), len(ids)) if ids[i] == target and ids[i - len(shown) : i] == shown]
            assert places, "the tokens before the target are those of the document"
            seen.append((int(document), int(target)))
    assert sorted(seen) == sorted((d, int(t)) for d, ids in enumerate(documents) for t in ids[1:])


def test_masked_batches_hide_targets_and_only_targets() -> None:
    documents = _documents()
    masked = [windows.mask(f"d{d}", len(ids), 0.5, 0) for d, ids in enumerate(documents)]
    cuts = [w for d, m in enumerate(masked) for w in windows.masked_windows(d, 16, m)]
    batches = windows.masked_batches(documents, cuts, 64, mask_id=3)
    assert sum(len(batch.targets) for batch in batches) == sum(int(m.sum()) for m in masked)
    for batch in batches:
        hidden = np.zeros(batch.ids.shape, dtype=bool)
        hidden[batch.rows, batch.columns] = True
        np.testing.assert_array_equal(batch.ids == 3, hidden)
        assert (batch.targets > 3).all()


def test_take_spreads_over_all_batches_and_stops_near_the_wanted_number() -> None:
    documents = [np.arange(4, 70, dtype=np.int64)] * 30
    cuts = [w for d, ids in enumerate(documents) for w in windows.causal_windows(len(ids), d, 16, 16)]
    batches = windows.causal_batches(documents, cuts, 64)
    some = windows.take(batches, 400)
    assert 300 <= sum(len(batch.targets) for batch in some) <= 500
    assert some[0] is batches[0]
    assert any(batch is some[-1] for batch in batches[len(batches) // 2 :])
    assert windows.take(batches, 10**9) == batches
