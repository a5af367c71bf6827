"""Structured methods on a problem whose answer is known: units add up to a target, each with its own worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.compression import optin, random_search
from models.compression.solvers import structured
from models.compression.solvers.structured import Structure, StructureConfig

LAYERS, GROUPS, NEURONS, TOKENS, WIDTH = 2, 4, 6, 12, 5


class Sums:
    """Every unit adds a vector of its own size to the features of every token; magnitudes say the opposite of worth."""

    layers, groups, neurons = LAYERS, GROUPS, NEURONS
    loadable_groups = (1, 2, 4)
    costs = {"groups": 30, "neurons": 7}  # noqa: RUF012 - a protocol wants a plain attribute

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.worth = {
            "groups": torch.rand(LAYERS, GROUPS, generator=generator) + 0.1,
            "neurons": torch.rand(LAYERS, NEURONS, generator=generator) + 0.1,
        }
        self.parts = {
            kind: worth[:, :, None, None] * torch.randn(*worth.shape, TOKENS, WIDTH, generator=generator)
            for kind, worth in self.worth.items()
        }
        self.calls = 0

    def _features(self, keep: Mapping[str, Tensor]) -> list[Tensor]:
        sums = [
            sum((self.parts[kind][layer] * keep[kind][layer][:, None, None]).sum(0) for kind in self.parts)
            for layer in range(LAYERS)
        ]
        return [sums[0], sums[0] + sums[1]]  # type: ignore[list-item, operator]

    def _all(self) -> dict[str, Tensor]:
        return {kind: torch.ones_like(worth) for kind, worth in self.worth.items()}

    def original(self, layer: int) -> tuple[Sequence[Tensor], Tensor]:
        features = self._features(self._all())
        return features[layer:], features[-1]

    def trajectory(self, layer: int, kind: str, removed: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        self.calls += 1
        keep = self._all()
        keep[kind][layer, removed] = 0
        features = self._features(keep)
        return features[layer:], features[-1]

    def loss(self, structure: Structure) -> float:
        keep = {"groups": structure.groups_LG.float(), "neurons": structure.neurons_LF.float()}
        return float((self._features(keep)[-1] - self.original(1)[1]).square().mean())

    def magnitudes(self) -> dict[str, Tensor]:
        return {kind: 1 / worth for kind, worth in self.worth.items()}


def test_identical_features_are_at_distance_zero_whatever_their_length() -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    assert float(optin.manifold_distance(3 * x, x)) == pytest.approx(0, abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))[0]
    assert float(optin.manifold_distance(x @ rotation, x)) == pytest.approx(0, abs=1e-11)


def test_the_manifold_distance_is_the_mean_over_pairs_of_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(5, 4, generator=generator) for _ in range(2))

    def cosine(x: Tensor, i: int, j: int) -> float:
        return float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))

    pairs = [(cosine(one, i, j) - cosine(other, i, j)) ** 2 for i in range(5) for j in range(5)]
    assert float(optin.manifold_distance(one, other)) == pytest.approx(math.fsum(pairs) / 25, rel=1e-5)


def test_the_divergence_is_that_of_softened_predictions() -> None:
    generator = torch.Generator().manual_seed(4)
    logits, reference = (torch.randn(3, 7, generator=generator) for _ in range(2))
    p, q = ((x / 2.5).softmax(-1).double() for x in (reference, logits))
    slow = float((p * (p / q).log()).sum(-1).mean()) * 2.5**2
    assert float(optin.divergence(logits, reference, 2.5)) == pytest.approx(slow, rel=1e-5)
    assert float(optin.divergence(reference, reference, 2.5)) == pytest.approx(0, abs=1e-6)


def test_importance_adds_the_layers_and_weighs_the_predictions() -> None:
    problem = Sums()
    found, original = problem.trajectory(0, "neurons", torch.arange(NEURONS) == 1), problem.original(0)
    features = optin.importance(found, original, optin.Config(divergence=0.0))
    distances = [float(optin.manifold_distance(x, y)) for x, y in zip(found[0], original[0], strict=True)]
    assert features == pytest.approx(sum(distances))
    both = optin.importance(found, original, optin.Config(divergence=2.0))
    assert both - features == pytest.approx(2 * float(optin.divergence(found[1], original[1], 4.0)), rel=1e-5)


def test_optin_measures_every_unit_once_and_removes_equal_shares() -> None:
    problem = Sums()
    structure = optin.Method().select(problem, optin.Config(heads=0.5, neurons=0.5))
    assert problem.calls == LAYERS * (GROUPS + NEURONS)
    assert structure.groups_LG.sum(1).tolist() == [2, 2]
    assert structure.neurons_LF.sum(1).tolist() == [3, 3]


def test_optin_beats_magnitude_and_the_median_draw_where_size_misleads() -> None:
    problem, config = Sums(), optin.Config(heads=0.5, neurons=0.5, trials=15)
    chosen = problem.loss(optin.Method().select(problem, config))
    best, median = structured.random_structures(problem, config)
    assert chosen < 0.7 * problem.loss(median)
    assert chosen < 0.7 * problem.loss(structured.by_magnitude(problem, config))
    assert problem.loss(best) <= problem.loss(median)


@pytest.mark.parametrize("macs", [0.3, 0.5, 0.7, 0.95])
def test_one_budget_of_multiplications_keeps_the_most_importance_that_fits(macs: float) -> None:
    """Against all pairs of numbers, and every choice of units being the best of its number."""
    problem = Sums()
    chosen = optin.Method().select(problem, optin.Config(macs=macs))
    scores = {kind: torch.zeros(LAYERS, count) for kind, count in (("groups", GROUPS), ("neurons", NEURONS))}
    for kind, score_LU in scores.items():
        for layer in range(LAYERS):
            for unit in range(score_LU.shape[1]):
                found = problem.trajectory(layer, kind, torch.arange(score_LU.shape[1]) == unit)
                score_LU[layer, unit] = optin.importance(found, problem.original(layer), optin.Config())
    room = macs * (GROUPS * 30 + NEURONS * 7)
    values = {
        (groups, neurons): sum(
            sum(sorted(row.tolist(), reverse=True)[:count])
            for kind, count in (("groups", groups), ("neurons", neurons))
            for row in scores[kind]
        )
        for groups in problem.loadable_groups
        for neurons in range(1, NEURONS + 1)
        if 30 * groups + 7 * neurons <= room
    }
    best = max(values, key=lambda pair: values[pair])
    assert chosen.groups_LG.sum(1).tolist() == [best[0]] * LAYERS
    assert chosen.neurons_LF.sum(1).tolist() == [best[1]] * LAYERS
    drawn = structured.draw(problem, structured.shares_of(chosen, optin.Config(macs=macs)), seed=1)
    assert (drawn.groups_LG.sum(1).tolist(), drawn.neurons_LF.sum(1).tolist()) == ([best[0]] * 2, [best[1]] * 2)


def test_a_budget_of_multiplications_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"macs = 0\.1 leaves no neuron beside the fewest heads"):
        optin.Method().select(Sums(), optin.Config(macs=0.1))
    with pytest.raises(ValidationError, match="do nothing beside macs"):
        optin.Config(macs=0.5, heads=0.25)


def test_neurons_measured_together_cost_less() -> None:
    problem = Sums()
    structure = optin.Method().select(problem, optin.Config(neurons=1 / 3, neurons_at_once=2))
    assert problem.calls == LAYERS * NEURONS / 2
    assert structure.neurons_LF.sum(1).tolist() == [4, 4]
    assert structure.groups_LG.all()


def test_random_search_returns_the_best_of_its_draws_and_the_same_ones_every_time() -> None:
    problem, config = Sums(), random_search.Config(neurons=0.5, trials=7)
    chosen = random_search.Method().select(problem, config)
    drawn = [structured.draw(problem, config, seed) for seed in range(7)]
    assert problem.loss(chosen) == min(problem.loss(structure) for structure in drawn)
    assert torch.equal(chosen.neurons_LF, random_search.Method().select(Sums(), config).neurons_LF)
    assert len({structure.neurons_LF.numpy().tobytes() for structure in drawn}) > 4


def test_more_draws_never_do_worse() -> None:
    problem = Sums()
    losses = [problem.loss(random_search.Method().select(problem, random_search.Config(trials=n))) for n in (1, 4, 16)]
    assert losses == sorted(losses, reverse=True)


def test_the_median_arm_lies_in_the_middle_of_the_draws() -> None:
    problem, config = Sums(), StructureConfig(neurons=0.5, trials=9)
    losses = sorted(problem.loss(structured.draw(problem, config, seed)) for seed in range(9))
    assert problem.loss(structured.random_structures(problem, config)[1]) == losses[4]


def test_magnitude_keeps_the_largest() -> None:
    problem = Sums()
    structure = structured.by_magnitude(problem, StructureConfig(neurons=0.5))
    for kept, sizes in zip(structure.neurons_LF, problem.magnitudes()["neurons"], strict=True):
        assert float(sizes[kept].min()) > float(sizes[~kept].max())


@pytest.mark.parametrize(
    ("units", "share", "gone"), [(8, 0.25, 2), (8, 0.99, 7), (1, 0.9, 0), (4, 0.1, 0), (0, 0.5, 0)]
)
def test_one_unit_always_stays(units: int, share: float, gone: int) -> None:
    assert structured.removed(units, share) == gone


def test_a_configuration_that_removes_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads = 0 and neurons = 0 remove nothing"):
        optin.Config(heads=0.0, neurons=0.0)
    assert optin.Config(heads=0.25, neurons=0.125).label == "h25-n12p5"
