"""LQ-LoRA: W ~ Q + L R, NormalFloat plus low rank, solved in turn; the start of adapters, or compression by itself.

From Q = 0, as the paper and its code do: (L, R) is the low rank nearest to W - Q, then Q = NF(W - L R), and so on until
the error first rises; the best pair is kept. The first adapter so takes the largest directions of W itself, and what is
rounded is smaller; from Q = NF(W), LoftQ's order, the adapter mends rounding errors only. With F the squared gradients,
what is made small is sum F (W - Q - L R)^2; the SVD sees F as the product of its row and column means (square roots:
D_row (W - Q) D_col). `weighting = "hessian"` takes the second moment of each input for F. Read by our loader: the
tensors of `normal_float`, `adapter_left` [O, r], `adapter_right` [r, I].

With `budget` set, every layer gets its own (bits, block, scale_bits, super_block, scale_dtype), chosen together by an
integer program under the total of stored bits, adapters included.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from models.compression.base import (
    BitAllocation,
    Calibration,
    Cost,
    Packed,
    SensitivitySource,
    Statistics,
    WeightMethod,
)
from models.compression.formats import normal_float
from models.compression.svd import truncated
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(normal_float.NormalFloatConfig):
    """Parameters of LQ-LoRA."""

    rank: int = Field(8, ge=0, le=4096, description="rank of the adapter, stored in bfloat16")
    weighting: Literal["fisher", "hessian", "none"] = Field(
        "fisher", description="what makes an error large: squared gradients, the inputs, or nothing"
    )
    iterations: int = Field(100, ge=1, le=1000, description="most turns between low rank and rounding")
    budget: float = Field(
        0.0, ge=0.0, le=16.0, description="stored bits a weight, shared out among layers; 0: these parameters for all"
    )

    @property
    def label(self) -> str:
        """For instance `nf3-r8`, `2p75bits-r8`."""
        size = f"{self.budget:g}bits".replace(".", "p") if self.budget else f"nf{self.bits}"
        return f"{size}-r{self.rank}" + ("" if self.weighting == "fisher" else f"-{self.weighting}")


@dataclass(frozen=True)
class AdaptedPacked(Packed):
    """NormalFloat and a low-rank adapter."""

    quantized: normal_float.NormalFloat
    left_OR: Tensor
    """bfloat16."""
    right_RI: Tensor
    """bfloat16."""

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return self.quantized.dequantize() + self.left_OR.float() @ self.right_RI.float()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of `normal_float`, and the adapter."""
        return self.quantized.tensors() | {"adapter_left": self.left_OR, "adapter_right": self.right_RI}


def importance(weight_OI: Tensor, statistics: Statistics, config: Config) -> Tensor:
    """Return the weight of each squared error [O, I], float32, positive; its scale is that of the statistics.

    Raises:
        ValueError: it was not measured.
    """
    if config.weighting == "none":
        return torch.ones_like(weight_OI, dtype=torch.float32)
    if config.weighting == "hessian":
        moment_II = statistics.second_moment("lq_lora", weight_OI.shape[1])
        found_OI = moment_II.diagonal().float().expand(weight_OI.shape)
    elif statistics.fisher_OI is None:
        raise ValueError("lq_lora needs calibration: statistics.fisher_OI is None")
    else:
        found_OI = statistics.fisher_OI.float()
    floor = float(found_OI.mean()) * 1e-6 or 1.0
    return found_OI.clamp(min=floor)


def decompose(weight_OI: Tensor, importance_OI: Tensor, config: Config) -> AdaptedPacked:
    """Return the best pair of NormalFloat and adapter that the turns came by."""
    best, least, rest_OI = None, float("inf"), weight_OI
    for _ in range(config.iterations):
        adapter = low_rank(rest_OI, importance_OI, config.rank)
        quantized = normal_float.quantize(weight_OI - adapter[0].float() @ adapter[1].float(), config)
        found = AdaptedPacked(quantized, *adapter)
        error = weighted_error(found.dequantize() - weight_OI, importance_OI)
        if best is not None and error >= least:
            break
        best, least, rest_OI = found, error, weight_OI - quantized.dequantize()
    assert best is not None
    return best


def low_rank(matrix_OI: Tensor, importance_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return bfloat16 factors [O, rank], [rank, I]: nearest where the importance is a product of rows and columns."""
    row_O1, column_I = importance_OI.mean(1, keepdim=True).sqrt(), importance_OI.mean(0).sqrt()
    left_OR, right_RI = truncated(row_O1 * matrix_OI * column_I, rank)
    left_OR, right_RI = left_OR / row_O1, right_RI / column_I
    return left_OR.to(torch.bfloat16).contiguous(), right_RI.to(torch.bfloat16).contiguous()


def weighted_error(error_OI: Tensor, importance_OI: Tensor) -> float:
    """Return sum F E^2."""
    return float((importance_OI.double() * error_OI.double().square()).sum())


def _adapter_shapes(weight_OI: Tensor, config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = weight_OI.shape
    rank = min(config.rank, rows, columns)
    return (rows, rank), (rank, columns)


class Method(WeightMethod[Config], config=Config):
    """LQ-LoRA."""

    bits: ClassVar[str] = "2, 3, 4, 8 and an adapter"
    calibration: ClassVar[Calibration] = "gradients"
    paper: ClassVar[str] = "Guo et al. 2023, LQ-LoRA (arXiv 2311.12023)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the decomposed weight.

        Raises:
            ValueError: what `weighting` asks for was not measured.
        """
        return decompose(weight_OI.float(), importance(weight_OI, statistics, config), config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        quantized = normal_float.restore(tensors, config)
        return AdaptedPacked(quantized, tensors["adapter_left"], tensors["adapter_right"])

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return the start of QLoRA: the weight rounded alone, beside an adapter of zeros of the same size."""
        sizes = _adapter_shapes(weight_OI, config)
        left_OR, right_RI = (torch.zeros(s, dtype=torch.bfloat16, device=weight_OI.device) for s in sizes)
        return {"qlora": AdaptedPacked(normal_float.quantize(weight_OI, config), left_OR, right_RI)}

    def allocation(self, config: Config) -> BitAllocation[Config] | None:
        """Return every storage of base and scales as an option; None without a budget."""
        if not config.budget:
            return None
        names = ("bits", "scale_bits", "scale_dtype", "block", "super_block")
        values = ((2, 3, 4, 8), (2, 3, 4, 8), ("bfloat16", "float16", "float32"), (16, 32, 64), (16, 64, 256))
        plain = config.model_copy(update={"budget": 0.0})
        options = [plain.model_copy(update=dict(zip(names, row, strict=True))) for row in itertools.product(*values)]
        source: SensitivitySource = "gradients" if config.weighting == "fisher" else "hessian"
        return BitAllocation(options, config.budget, source)

    def cost(self, weight_OI: Tensor, statistics: Statistics, option: Config) -> Cost:
        """Return the size, and the weighted squared error of rounding alone, of one layer under `option`.

        The adapter is counted in the bits, but left out of the error, which saves hundreds of decompositions a layer.
        """
        quantized = normal_float.quantize(weight_OI, option)
        adapter = sum(16 * rows * columns for rows, columns in _adapter_shapes(weight_OI, option))
        stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in quantized.tensors().values())
        error_OI = quantized.dequantize() - weight_OI
        return Cost(stored + adapter, weighted_error(error_OI, importance(weight_OI, statistics, option)))
