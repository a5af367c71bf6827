"""The OBS loop behind GPTQ: quantize column by column, and let the columns still to come absorb each error.

It takes any column quantizer, so pruning, binary codes and mixed precision share it. With the damped second moment
H = 2/n X^T X + damp * mean(diag) * 1 and the upper factor U of H^-1 = U^T U, quantizing column i leaves the error
e = (w_i - q_i) / U_ii, and the optimal correction of the columns j > i is w_j -= e U_ij (GPTQ, arXiv 2210.17323).
Columns are visited in blocks only for speed: the result is the same for every block size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class ColumnQuantizer(Protocol):
    """What decides the stored value of a column."""

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        """Look at the next block of columns, up to date with all corrections, before its first column.

        Args:
            first: position of the block's first column in the order of the visit.
            weight_OB: current weights of the block, float64.
            inverse_B: U_ii of its columns: `weight^2 / inverse^2` is the OBS salience.
        """

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        """Return the stored value [O] of the column at `position` in the order of the visit."""


def damped(hessian_II: Tensor, tokens: int, damp: float) -> Tensor:
    """Return H = 2/n X^T X + damp * mean(diag) * 1, float64, positive definite also where inputs are always zero."""
    scaled_II = hessian_II.double() * (2.0 / max(tokens, 1))
    mean = float(scaled_II.diagonal().mean())
    return scaled_II + torch.eye(len(scaled_II), dtype=torch.float64, device=scaled_II.device) * (damp * mean or 1.0)


def inverse_factor(hessian_II: Tensor) -> Tensor:
    """Return upper triangular U with H^-1 = U^T U.

    Raises:
        ValueError: H is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian_II)
    if int(failed):
        raise ValueError("the damped second moment is not positive definite; raise `damp` or use more samples")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def compensate(weight_OI: Tensor, hessian_II: Tensor, quantize: ColumnQuantizer, *, block: int = 128) -> Tensor:
    """Return the stored weight [O, I], float64, columns visited from left to right.

    Args:
        weight_OI: the weight, columns already in the order of the visit.
        hessian_II: damped second moment in the same order.
        quantize: chooses the stored value of each column.
        block: columns between two calls of `quantize.begin`.
    """
    factor_II = inverse_factor(hessian_II)
    current_OI = weight_OI.double().clone()
    stored_OI = torch.empty_like(current_OI)
    for first in range(0, current_OI.shape[1], block):
        span = slice(first, min(first + block, current_OI.shape[1]))
        stored_OI[:, span], errors_OB = _block(current_OI[:, span].clone(), factor_II[span, span], quantize, first)
        current_OI[:, span.stop :] -= errors_OB @ factor_II[span, span.stop :]
    return stored_OI


def _block(weight_OB: Tensor, factor_BB: Tensor, quantize: ColumnQuantizer, first: int) -> tuple[Tensor, Tensor]:
    """Quantize one block in place; returns the stored values and the errors e, both [O, B]."""
    quantize.begin(first, weight_OB, factor_BB.diagonal())
    stored_OB, errors_OB = torch.empty_like(weight_OB), torch.empty_like(weight_OB)
    for i in range(weight_OB.shape[1]):
        stored_OB[:, i] = quantize(first + i, weight_OB[:, i])
        errors_OB[:, i] = (weight_OB[:, i] - stored_OB[:, i]) / factor_BB[i, i]
        weight_OB[:, i + 1 :] -= torch.outer(errors_OB[:, i], factor_BB[i, i + 1 :])
    return stored_OB, errors_OB
