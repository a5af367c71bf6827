"""The OBS loop against the textbook: at every column, solve for the best change of all columns still free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.compression.base import relative_error
from models.compression.solvers import obs


class Tenths:
    """Rounds to one decimal, and keeps what the loop showed it."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, Tensor, Tensor]] = []
        self.seen: list[Tensor] = []

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        self.begun.append((first, weight_OB.clone(), inverse_B.clone()))

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        assert position == len(self.seen)
        self.seen.append(weight_O.clone())
        return (weight_O * 10).round() / 10


def reference(weight_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Quantize column by column; after each, re-solve the least squares of the columns to the right by brute force."""
    target, current, stored = weight_OI.double(), weight_OI.double().clone(), weight_OI.double().clone()
    columns = target.shape[1]
    for i in range(columns):
        stored[:, i] = (current[:, i] * 10).round() / 10
        fixed, free = list(range(i + 1)), list(range(i + 1, columns))
        if free:
            # minimise (s - t) H (s - t)^T over the free columns, the fixed ones being stored already
            error = stored[:, fixed] - target[:, fixed]
            current[:, free] = (
                target[:, free] - error @ hessian_II[fixed][:, free] @ hessian_II[free][:, free].inverse()
            )
    return stored


@pytest.mark.parametrize("block", [1, 5, 8, 128])
def test_the_loop_is_the_optimal_greedy_compensation(block: int, layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=6, columns=24)
    hessian = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    assert torch.allclose(obs.compensate(weight, hessian, Tenths(), block=block), reference(weight, hessian), atol=1e-9)


def test_the_block_size_changes_nothing(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=6, columns=40)
    hessian = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    results = [obs.compensate(weight, hessian, Tenths(), block=block) for block in (1, 7, 40)]
    assert all(torch.allclose(results[0], other, atol=1e-9) for other in results[1:])


def test_compensation_beats_rounding_alone(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer()
    hessian = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    alone = relative_error(weight, (weight * 10).round() / 10, hessian)
    assert relative_error(weight, obs.compensate(weight, hessian, Tenths()), hessian) < 0.8 * alone


def test_uncorrelated_inputs_leave_nothing_to_compensate(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(columns=16)
    stored = obs.compensate(weight, torch.diag(torch.arange(1.0, 17.0)).double(), Tenths())
    assert torch.allclose(stored, (weight.double() * 10).round() / 10)


def test_a_quantizer_sees_each_block_up_to_date(layer: Callable[..., Any]) -> None:
    weight, _, seen = layer(rows=4, columns=12)
    hessian = obs.damped(seen.hessian_II, seen.tokens, 0.01)
    quantizer = Tenths()
    obs.compensate(weight, hessian, quantizer, block=4)
    assert [first for first, _, _ in quantizer.begun] == [0, 4, 8]
    for first, block, inverse in quantizer.begun:
        assert torch.allclose(block[:, 0], quantizer.seen[first])
        # U_ii^2 is the leading entry of the inverse of H over the columns not yet visited
        rest = hessian[first:, first:].inverse()
        assert float(inverse[0]) ** 2 == pytest.approx(float(rest[0, 0]), rel=1e-8)


def test_a_column_whose_input_is_always_zero_is_rounded_alone(layer: Callable[..., Any]) -> None:
    weight, inputs, _ = layer(columns=16)
    inputs[:, 3] = 0.0
    hessian = obs.damped(inputs.double().T @ inputs.double(), len(inputs), 0.01)
    stored = obs.compensate(weight, hessian, Tenths())
    assert torch.allclose(stored[:, 3], (weight[:, 3].double() * 10).round() / 10)


def test_all_zero_inputs_are_no_reason_to_fail(layer: Callable[..., Any]) -> None:
    weight, _, _ = layer(columns=8)
    stored = obs.compensate(weight, obs.damped(torch.zeros(8, 8), 5, 0.01), Tenths())
    assert torch.allclose(stored, (weight.double() * 10).round() / 10)


def test_damping_adds_its_share_of_the_mean_diagonal() -> None:
    damped = obs.damped(torch.diag(torch.tensor([1.0, 3.0])), tokens=4, damp=0.5)
    assert torch.allclose(damped, torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)))


def test_an_indefinite_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite; raise `damp`"):
        obs.inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
