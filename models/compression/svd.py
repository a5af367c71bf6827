"""Plain low rank: a matrix as the product of two thin ones, by singular values of the weight as its inputs see it.

With X^T X = S S^T the output error of W' is ||(W - W') S||, so the best W' of rank r is the truncated SVD of W S times
S^-1 (SVD-LLM, arXiv 2403.07378). `metric = "diagonal"` keeps only the scale of each input, like ASVD (arXiv
2312.05821), and `"weight"` is the plain SVD. Read by our loader: `weight_left` [O, r], `weight_right` [r, I].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.solvers import obs
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(MethodConfig):
    """Parameters of low rank."""

    share: float = Field(0.5, gt=0.0, le=1.0, description="numbers stored, as a share of those of the dense weight")
    rank: int = Field(0, ge=0, le=65536, description="rank of every layer; 0: the largest one within `share`")
    metric: Literal["hessian", "diagonal", "weight"] = Field(
        "hessian", description="what makes an error large: the inputs, their scales alone, or nothing"
    )
    value_bits: Literal[16, 32] = Field(16, description="bits of a stored number")
    damp: float = Field(
        0.01, gt=0.0, le=10.0, description="ridge on the second moment, as a share of its mean diagonal"
    )

    @property
    def label(self) -> str:
        """For instance `50-bf16`, `r32-fp32-weight`."""
        size = f"r{self.rank}" if self.rank else f"{self.share * 100:g}".replace(".", "p")
        metric = "" if self.metric == "hessian" else f"-{self.metric}"
        return f"{size}-{'bf16' if self.value_bits == 16 else 'fp32'}{metric}"


@dataclass(frozen=True)
class LowRankPacked(Packed):
    """Two thin factors."""

    left_OR: Tensor
    right_RI: Tensor

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.left_OR.float() @ self.right_RI.float()

    def tensors(self) -> dict[str, Tensor]:
        """Return both factors."""
        return {"weight_left": self.left_OR, "weight_right": self.right_RI}

    def forward(self, x: Tensor) -> Tensor:
        """Apply one factor after the other, which is cheaper than their product."""
        return x @ self.right_RI.to(x.dtype).T @ self.left_OR.to(x.dtype).T


def rank_of(weight_OI: Tensor, config: Config) -> int:
    """Return the rank of one layer, at least one."""
    rows, columns = weight_OI.shape
    wanted = config.rank or int(config.share * rows * columns / (rows + columns))
    return max(1, min(wanted, rows, columns))


def truncated(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors [O, rank] and [rank, I] of the nearest matrix of that rank, singular values split evenly."""
    left_OK, values_K, right_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
    root_R = values_K[:rank].sqrt()
    return left_OK[:, :rank] * root_R, root_R.unsqueeze(1) * right_KI[:rank]


def _pack(left_OR: Tensor, right_RI: Tensor, config: Config) -> Packed:
    dtype = torch.bfloat16 if config.value_bits == 16 else torch.float32
    return LowRankPacked(left_OR.to(dtype).contiguous(), right_RI.to(dtype).contiguous())


class Method(WeightMethod[Config], config=Config):
    """Low rank."""

    bits: ClassVar[str] = "value_bits x share of the parameters"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = "Wang et al. 2024, SVD-LLM (arXiv 2403.07378)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the low-rank weight.

        Raises:
            ValueError: no usable second moment, unless `metric = "weight"` needs none.
        """
        rank, weight_OI = rank_of(weight_OI, config), weight_OI.double()
        if config.metric == "weight":
            return _pack(*truncated(weight_OI, rank), config)
        moment_II = obs.damped(statistics.second_moment("svd", weight_OI.shape[1]), statistics.tokens, config.damp)
        if config.metric == "diagonal":
            scale_I = moment_II.diagonal().sqrt()
            left_OR, right_RI = truncated(weight_OI * scale_I, rank)
            return _pack(left_OR, right_RI / scale_I, config)
        root_II = torch.linalg.cholesky(moment_II)
        left_OR, right_RI = truncated(weight_OI @ root_II, rank)
        return _pack(left_OR, torch.linalg.solve_triangular(root_II, right_RI, upper=False, left=False), config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:  # noqa: ARG002
        """Rebuild a packed weight from its stored tensors."""
        return LowRankPacked(tensors["weight_left"], tensors["weight_right"])

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
        """Return the projection on random inputs, and the SVD that ignores the inputs, of the same rank."""
        rank = rank_of(weight_OI, config)
        generator = torch.Generator().manual_seed(0)
        draw_IR = torch.randn(weight_OI.shape[1], rank, generator=generator, dtype=torch.float64)
        basis_IR = torch.linalg.qr(draw_IR.to(weight_OI.device)).Q
        baselines = {"random": _pack(weight_OI.double() @ basis_IR, basis_IR.T, config)}
        if config.metric != "weight":
            baselines["plain"] = self.compress(weight_OI, statistics, config.model_copy(update={"metric": "weight"}))
        return baselines
