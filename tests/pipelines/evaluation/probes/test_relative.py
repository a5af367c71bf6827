"""Relative representations: blind to what means nothing, and measuring what does, beside what chance gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.stage import StageContext
from pipelines.evaluation import stage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.probe import ProbeSettings, Subject
from pipelines.evaluation.probes import relative
from pipelines.measure import heldout, scoring
from pipelines.measure.scoring import Scorer


def space(seed: int = 0, documents: int = 60, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(documents, width)) + 3.0


def represented(points: np.ndarray) -> np.ndarray:
    return relative.representation(points[20:], points[:20])


def subject(scorer: Scorer, prepared: Artifact, documents: int | None = None) -> Subject:
    return Subject(scorer, prepared.path, heldout.load(prepared.path, documents), window=64, bootstrap={})


def test_rotation_scale_and_shift_change_nothing() -> None:
    points = space()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    assert np.allclose(represented(points), represented(4.2 * points @ rotation - 7.0), atol=1e-12)


def test_a_representation_is_the_cosine_to_each_anchor_around_their_mean() -> None:
    points = space()
    found, centre = represented(points), points[:20].mean(axis=0)
    for place, anchor in ((0, 3), (39, 19)):
        x, a = points[20 + place] - centre, points[anchor] - centre
        assert found[place, anchor] == pytest.approx(x @ a / np.sqrt((x @ x) * (a @ a)))
    assert np.abs(found).max() <= 1 + 1e-12


def test_neighbours_are_the_nearest_others() -> None:
    rows = represented(space())
    found = relative.neighbours(rows, 3)
    for place, row in enumerate(rows):
        cosines = [x @ row / np.linalg.norm(x) for x in rows]
        others = sorted((n for n in range(len(rows)) if n != place), key=lambda n: -cosines[n])
        assert found[place].tolist() == others[:3]


def test_a_space_is_at_no_distance_from_itself_and_others_as_far_as_chance() -> None:
    mine, other = represented(space(0)), represented(space(1))
    same = relative.compare(mine, mine)
    assert same["distance"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert same["overlap"]["value"] == 1.0
    assert same["baseline_overlap"] < 0.4
    far = relative.compare(mine, other)
    assert far["distance"]["value"] == pytest.approx(far["baseline_distance"], rel=0.1)
    assert far["overlap"]["low"] < 0.2


def test_more_noise_is_more_distance_and_less_overlap() -> None:
    points, noise = space(), np.random.default_rng(2).normal(size=(60, 12))
    found = [relative.compare(represented(points), represented(points + s * noise)) for s in (0.05, 0.2, 0.8)]
    distances, overlaps = ([row[key]["value"] for row in found] for key in ("distance", "overlap"))
    assert distances == sorted(distances)
    assert overlaps == sorted(overlaps, reverse=True)
    assert all(row["distance"]["low"] < row["distance"]["value"] < row["distance"]["high"] for row in found)


def test_anchors_are_a_function_of_the_ids_and_never_described_by_themselves() -> None:
    ids = [f"doc-{n}" for n in range(100)]
    anchors, documents = relative.roles(ids)
    assert (len(anchors), len(documents)) == (33, 67)
    assert not set(anchors) & set(documents)
    order = np.random.default_rng(0).permutation(100)
    moved, _ = relative.roles([ids[n] for n in order])
    assert {ids[order[n]] for n in moved} == {ids[n] for n in anchors}
    assert len(relative.roles([str(n) for n in range(1000)])[0]) == relative.MAX_ANCHORS


def test_an_embedding_is_the_mean_of_the_last_hidden_states(encoder: Any) -> None:
    ids = np.arange(5, 17)
    slow = encoder(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[-1][0]
    assert scoring.embed(Scorer(encoder, "encoder", "x", "cpu"), ids).shape == slow.mean(0).shape
    with torch.no_grad():
        last = encoder.model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
    assert np.allclose(scoring.embed(Scorer(encoder, "encoder", "x", "cpu"), ids), last.double().mean(0), atol=1e-6)


def test_decoders_and_handfuls_of_documents_are_not_described(decoder: Any, encoder: Any, prepared: Artifact) -> None:
    probe = relative.Relative()
    with pytest.raises(ConfigError, match="'relative' does not measure x: it measures encoder models; the family"):
        probe.measure(subject(Scorer(decoder, "decoder", "x", "cpu"), prepared), ProbeSettings())
    few = subject(Scorer(encoder, "encoder", "x", "cpu"), prepared, relative.FEWEST - 1)
    assert probe.refusal(few) == "it needs 12 held-out documents or more; there are 11"


def test_a_rounded_variant_stays_near_its_base_model_and_other_weights_do_not(
    encoder: Any,
    encoder_artifact: Artifact,
    save_model: Callable[[Any], Artifact],
    prepared: Artifact,
    small: EvaluateConfig,
    context: StageContext,
    tmp_path: Path,
) -> None:
    """The baseline is a model of the same shape with other weights: drawn anew, as another seed would."""
    from transformers import AutoModelForMaskedLM

    config = small.model_copy(update={"max_documents": None, "kl_tokens": 0})
    rounded, other = copy.deepcopy(encoder), AutoModelForMaskedLM.from_config(encoder.config)
    with torch.no_grad():
        for module in rounded.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(dim=1, keepdim=True) / 31
                module.weight.copy_((module.weight / scale).round() * scale)
    stage.run(config, {"prepare": prepared, "model": encoder_artifact}, tmp_path, context)
    whole = np.load(tmp_path / "relative.npy")
    assert whole.shape == (
        len(relative.roles([d.id for d in heldout.load(prepared.path).documents])[1]),
        whole.shape[1],
    )
    probe, rows = relative.Relative(), []
    for model in (rounded, other):
        found = probe.measure(subject(Scorer(model.eval(), "encoder", "x", "cpu"), prepared), ProbeSettings())
        assert found.array is not None
        rows.append(relative.compare(found.array, whole))
    near, far = rows
    assert 0 < near["distance"]["high"] < 0.5 * far["distance"]["low"]
    assert near["overlap"]["value"] > far["overlap"]["value"]
    assert near["distance"]["high"] < near["baseline_distance"]
