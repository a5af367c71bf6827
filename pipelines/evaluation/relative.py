"""How far one embedding space is from another, by documents seen from the same anchors.

An encoder's space means nothing by itself: two trainings give two rotations. Relative representations (Moschella et al.
2022, arXiv 2209.15430) describe a document by its cosines to fixed anchor documents, which no rotation, scale or shift
changes (embeddings are centred on the anchors' mean, because pooled embeddings share a large common part). Anchors are
held-out documents of the prepare artifact, picked by the hash of their ids: the same corpus gives the same anchors.

Two measures, both with intervals over documents and beside what chance gives: the mean absolute difference of cosines
(null arm: the anchors of one side shuffled), and the share of common nearest neighbours (null arm: documents shuffled).

Shapes: Q documents, A anchors, D width, K neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.measure import intervals
from pipelines.measure.heldout import Heldout

if TYPE_CHECKING:
    from pipelines.measure.scoring import Scorer

Floats = NDArray[np.float64]
MAX_ANCHORS, MAX_DOCUMENTS = 64, 512
NEIGHBOURS = 5
FEWEST = 12
"""Documents below which nothing is measured: too few for anchors and neighbours."""


# ---- pure functions ---------------------------------------------------------------------------------------------


def roles(ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the positions of the anchors and of the documents described by them; a function of the ids alone."""
    ranked = sorted(
        range(len(ids)), key=lambda place: (hashlib.sha256(b"anchor " + ids[place].encode()).digest(), place)
    )
    anchors = min(len(ids) // 3, MAX_ANCHORS)
    return sorted(ranked[:anchors]), sorted(ranked[anchors : anchors + MAX_DOCUMENTS])


def representation(embeddings_QD: Floats, anchors_AD: Floats) -> Floats:
    """Return the cosines [Q, A] of documents to anchors, around the anchors' mean."""
    centre = anchors_AD.mean(axis=0)
    return _unit(embeddings_QD - centre) @ _unit(anchors_AD - centre).T


def neighbours(relative_QA: Floats, count: int) -> NDArray[np.int64]:
    """Return the `count` nearest other documents of each, by cosine of their representations [Q, K]."""
    near_QQ = _unit(relative_QA) @ _unit(relative_QA).T
    np.fill_diagonal(near_QQ, -np.inf)
    return np.argsort(-near_QQ, axis=1, kind="stable")[:, :count]


def compare(one_QA: Floats, other_QA: Floats, **options: Any) -> dict[str, Any]:
    """Return how far two spaces are apart.

    Args:
        one_QA: representations in one space.
        other_QA: of the same documents by the same anchors in the other.
        options: of the bootstrap: samples, seed, confidence.

    Returns:
        `distance` and `overlap` (value, low, high), and `null_distance` and `null_overlap`, what chance gives.
    """
    shuffle = np.random.default_rng(0)
    columns, rows = shuffle.permutation(one_QA.shape[1]), shuffle.permutation(len(one_QA))
    nearest = [neighbours(side, min(NEIGHBOURS, len(side) - 1)) for side in (one_QA, other_QA)]
    return {
        "distance": _mean(np.abs(one_QA - other_QA).mean(axis=1), options).to_json(),
        "overlap": _mean(_common(*nearest), options).to_json(),
        "null_distance": float(np.abs(one_QA - other_QA[:, columns]).mean()),
        "null_overlap": float(_common(nearest[0], nearest[1][rows]).mean()),
        "documents": len(one_QA),
        "anchors": one_QA.shape[1],
    }


def _common(one_QK: NDArray[np.int64], other_QK: NDArray[np.int64]) -> Floats:
    """Return the share of common entries of each row [Q]."""
    return np.array([len(np.intersect1d(a, b)) / len(a) for a, b in zip(one_QK, other_QK, strict=True)])


def _mean(values_Q: Floats, options: dict[str, Any]) -> intervals.Interval:
    return intervals.bootstrap(lambda total, count: total / count, (values_Q, np.ones_like(values_Q)), **options)


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# ---- models -----------------------------------------------------------------------------------------------------


def measure(scorer: Scorer, held: Heldout, context: int) -> Floats | None:
    """Return the representations [Q, A] of the held-out documents; None for a decoder, or too few documents."""
    if scorer.family != "encoder" or len(held.documents) < FEWEST:
        return None
    anchors, documents = roles([document.id for document in held.documents])
    embedded = {place: embed(scorer, held.tokens[place][:context]) for place in (*anchors, *documents)}
    return representation(
        np.stack([embedded[place] for place in documents]), np.stack([embedded[place] for place in anchors])
    )


def embed(scorer: Scorer, tokens_T: NDArray[np.int64]) -> Floats:
    """Return the mean of an encoder's last hidden states over the tokens of one document [D]."""
    import torch

    scorer.check_device()
    ids_BT = torch.from_numpy(tokens_T)[None].to(scorer.device)
    with torch.inference_mode():
        hidden_BTD = scorer.model.base_model(input_ids=ids_BT).last_hidden_state
    return hidden_BTD[0].double().mean(dim=0).cpu().numpy()
