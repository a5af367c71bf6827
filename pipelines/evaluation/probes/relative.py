"""How far one embedding space is from another, by documents seen from the same anchors.

An encoder's space means nothing by itself: two trainings give two rotations. Relative representations (Moschella et al.
2022, arXiv 2209.15430) describe a document by its cosines to fixed anchor documents, which no rotation, scale or shift
changes (embeddings are centred on the anchors' mean, because pooled embeddings share a large common part). Anchors are
held-out documents of the prepare artifact, picked by the hash of their ids: the same corpus gives the same anchors.

Two measures, both with intervals over documents and beside what chance gives: the mean absolute difference of cosines
(baseline: the anchors of one side shuffled), and the share of common nearest neighbours (baseline: documents shuffled).

Shapes: Q documents, A anchors, D width, K neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models.lazy import lazy_module
from pipelines.evaluation.probe import Measurement, Probe, ProbeSettings, Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.measure.intervals import Interval

    Floats = NDArray[np.float64]
else:
    np = lazy_module("numpy")

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
        `distance` and `overlap` (value, low, high), and what chance gives: `baseline_distance`, `baseline_overlap`.
    """
    shuffle = np.random.default_rng(0)
    columns, rows = shuffle.permutation(one_QA.shape[1]), shuffle.permutation(len(one_QA))
    nearest = [neighbours(side, min(NEIGHBOURS, len(side) - 1)) for side in (one_QA, other_QA)]
    return {
        "distance": _mean(np.abs(one_QA - other_QA).mean(axis=1), options).to_json(),
        "overlap": _mean(_common(*nearest), options).to_json(),
        "baseline_distance": float(np.abs(one_QA - other_QA[:, columns]).mean()),
        "baseline_overlap": float(_common(nearest[0], nearest[1][rows]).mean()),
        "documents": len(one_QA),
        "anchors": one_QA.shape[1],
    }


def _common(one_QK: NDArray[np.int64], other_QK: NDArray[np.int64]) -> Floats:
    """Return the share of common entries of each row [Q]."""
    return np.array([len(np.intersect1d(a, b)) / len(a) for a, b in zip(one_QK, other_QK, strict=True)])


def _mean(values_Q: Floats, options: dict[str, Any]) -> Interval:
    from pipelines.measure import intervals

    return intervals.bootstrap(lambda total, count: total / count, (values_Q, np.ones_like(values_Q)), **options)


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# ---- models -----------------------------------------------------------------------------------------------------


class Relative(Probe[ProbeSettings]):
    """An encoder's held-out documents seen from anchor documents, and how far a variant's space is from its base's."""

    families = frozenset({"encoder"})
    Settings = ProbeSettings

    def refusal(self, subject: Subject) -> str | None:
        """Return why this model cannot be measured; None where it can."""
        few = f"it needs {FEWEST} held-out documents or more; there are {len(subject.documents.documents)}"
        return super().refusal(subject) or (few if len(subject.documents.documents) < FEWEST else None)

    def _measure(self, subject: Subject, settings: ProbeSettings) -> Measurement:  # noqa: ARG002 - it has none
        from pipelines.measure.scoring import embed

        documents = subject.documents
        anchors, described = roles([document.id for document in documents.documents])
        embedded = {n: embed(subject.scorer, documents.tokens[n][: subject.window]) for n in (*anchors, *described)}
        found_QA = representation(np.stack([embedded[n] for n in described]), np.stack([embedded[n] for n in anchors]))
        base_QA = subject.base_array(self.name)
        return Measurement(
            result={"documents": len(described), "anchors": len(anchors)},
            versus_base={} if base_QA is None else compare(found_QA, base_QA, **subject.bootstrap),
            array=found_QA,
        )
