"""Draws that are pure, uniform or weighted, and the names and groups that go with them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.optim import lisa


def test_a_draw_is_the_same_always_and_everywhere() -> None:
    drawn = [lisa.draw(7, interval, layers=12, active=2) for interval in range(5)]
    assert drawn == [(0, 5), (0, 8), (2, 10), (4, 10), (3, 4)]


def test_a_draw_reads_and_moves_no_global_generator() -> None:
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    lisa.draw(0, 0, 8, 3)
    after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    assert states == after


@pytest.mark.parametrize("active", [0, 1, 3, 6])
def test_a_draw_has_distinct_ascending_layers(active: int) -> None:
    for interval in range(50):
        drawn = lisa.draw(1, interval, layers=6, active=active)
        assert len(drawn) == active
        assert list(drawn) == sorted(set(drawn))
        assert all(0 <= layer < 6 for layer in drawn)


def test_uniform_draws_take_every_layer_equally_often() -> None:
    counts = Counter(layer for interval in range(6000) for layer in lisa.draw(3, interval, 6, 2))
    assert all(abs(counts[layer] - 2000) < 150 for layer in range(6))  # four standard deviations


def test_weighted_draws_follow_sampling_without_replacement() -> None:
    weights, draws = [1.0, 2.0, 5.0], 6000
    counts = Counter(lisa.draw(3, interval, 3, 2, weights) for interval in range(draws))
    for pair in itertools.combinations(range(3), 2):
        chance = sum(
            weights[first] / 8 * weights[second] / (8 - weights[first]) for first, second in (pair, pair[::-1])
        )
        assert abs(counts[pair] / draws - chance) < 0.03


def test_a_layer_of_weight_zero_is_never_drawn() -> None:
    assert all(1 not in lisa.draw(0, interval, 3, 2, [1, 0, 1]) for interval in range(100))


@pytest.mark.parametrize(
    ("layers", "active", "weights", "message"),
    [
        (4, 5, None, "5 active layers of 4"),
        (4, -1, None, "-1 active layers"),
        (2, 1, [1.0], "1 sampling weights for 2 layers"),
        (2, 1, [1.0, -1.0], "not negative"),
        (2, 1, [1.0, float("nan")], "finite"),
        (3, 2, [1.0, 0.0, 0.0], "only 1 have a sampling weight"),
    ],
)
def test_impossible_draws_are_refused(layers: int, active: int, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lisa.draw(0, 0, layers, active, weights)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3),
        ("transformer.h.11.mlp.c_fc.bias", 11),
        ("bert.encoder.layer.0.output.dense.weight", 0),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layer_numbers_are_found_in_usual_names(name: str, layer: int | None) -> None:
    assert lisa.layer_of(name) == layer


def test_what_belongs_to_no_layer_is_always_active() -> None:
    names = ["embed.weight", "layers.0.w", "layers.1.w", "norm.weight"]
    assert lisa.active_names(names, (1,)) == ["embed.weight", "layers.1.w", "norm.weight"]


def test_requires_grad_follows_the_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    lisa.set_requires_grad(model, ["1.weight"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.weight"]


def test_layer_groups_hold_every_parameter_once_in_layer_order() -> None:
    pairs = [
        (name, nn.Parameter(torch.ones(1))) for name in ("e.w", "layers.1.w", "layers.0.w", "layers.1.b", "norm.w")
    ]
    groups = lisa.layer_groups(pairs)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names == [["e.w", "norm.w"], ["layers.0.w"], ["layers.1.w", "layers.1.b"]]


def test_layer_groups_of_groups_keep_each_groups_options() -> None:
    def pairs(*names: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, nn.Parameter(torch.ones(1))) for name in names]

    given = [
        {"params": pairs("e.w", "layers.1.w", "layers.0.w"), "weight_decay": 0.1},
        {"params": pairs("layers.1.b", "norm.w"), "weight_decay": 0.0},
    ]
    made = lisa.layer_groups(given)
    assert [(group["weight_decay"], [name for name, _ in group["params"]]) for group in made] == [
        (0.1, ["e.w"]),
        (0.1, ["layers.0.w"]),
        (0.1, ["layers.1.w"]),
        (0.0, ["norm.w"]),
        (0.0, ["layers.1.b"]),
    ]
    assert lisa.layer_groups([]) == []


def test_importance_is_the_ratio_of_mean_layer_norms() -> None:
    tuned = lisa.layer_norms({"layers.0.a": 2.0, "layers.0.b": 4.0, "layers.1.a": 3.0, "norm.w": 9.0})
    assert tuned == [3.0, 3.0]
    assert lisa.importance(tuned, [1.0, 3.0]) == [0.75, 0.25]


def test_norms_that_skip_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="without a gap"):
        lisa.layer_norms({"layers.1.a": 1.0})


@pytest.mark.parametrize(("tuned", "reference"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0])])
def test_importance_of_unfit_norms_is_refused(tuned: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"layers|above 0"):
        lisa.importance(tuned, reference)
