"""BiLLM: everything in one bit, salient columns twice, and the rest split by size; block after block of columns.

In each block of columns: (1) columns are ranked by their OBS salience, and as many as make the block's error least are
binarized twice, the second time on what the first left over; (2) the other weights fall into two groups by |w|, at the
threshold that makes their error least, each group with its own two values; (3) the block's error is taken up by the
blocks still to come.

Beside the released code, whose searches look at the salience-transformed matrix: all errors are those of W, as in the
paper. No weight changes inside a block, so the exact correction of what follows is -E U_BB^-1 U[B, rest] (a triangular
solve, the default); the released one divides elementwise by diag(U_BB) (`correction = "elementwise"`).

Stored, and counted: eight bfloat16 numbers for each row and block (1 bit a weight with blocks of 128), signs (1), marks
of the large group (1 for every weight that is not salient) and second signs (1 for every salient weight): 3 bits a
weight, where the paper speaks of 1.08. Read by our loader: `weight_columns` bitmap of salient columns [I/8];
`weight_signs` uint8 [O, I/8]; `weight_residual` and `weight_marks`, packed bits in row order; `weight_levels`
[O, blocks, 8], (mean, amplitude) of salient, of its residual, of small and of large weights; `weight_shape`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats import binary, sparse
from models.compression.solvers import obs
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


_PERCENTILES = tuple(0.10 + 0.01 * step for step in range(81))
Ablation = Literal["", "random_columns", "no_residual", "no_split", "uncompensated"]


class Config(MethodConfig):
    """Parameters of BiLLM."""

    block: int = Field(128, ge=8, le=65536, description="columns that share their numbers and are corrected together")
    most_salient: int = Field(50, ge=1, le=4096, description="largest number of salient columns that is tried")
    correction: Literal["exact", "elementwise"] = Field(
        "exact", description="how later blocks absorb a block's error: triangular solve, or as released"
    )
    damp: float = Field(
        0.01, gt=0.0, le=10.0, description="ridge on the second moment, as a share of its mean diagonal"
    )

    @property
    def label(self) -> str:
        """For instance `b128`, `b32-elementwise`."""
        return f"b{self.block}" + ("-elementwise" if self.correction == "elementwise" else "")


class Block(NamedTuple):
    """One block of columns [O, B] in binary."""

    salient_B: Tensor
    """bool."""
    sign_OB: Tensor
    """bool: first signs of all weights."""
    residual_OB: Tensor
    """bool: second signs; only salient columns matter."""
    mark_OB: Tensor
    """bool: weights of the large group; only the other columns matter."""
    levels_O8: Tensor
    """float32, exact in bfloat16; see the module docstring."""

    def dense(self) -> Tensor:
        """Return what is stored [O, B], float32."""
        first, residual, small, large = self.levels_O8.unflatten(-1, (4, 2)).unbind(-2)
        two = (_two_values(level, sign) for level, sign in ((first, self.sign_OB), (residual, self.residual_OB)))
        split = torch.where(self.mark_OB, _two_values(large, self.sign_OB), _two_values(small, self.sign_OB))
        return torch.where(self.salient_B, sum(two), split)


@dataclass(frozen=True)
class BlocksPacked(Packed):
    """Blocks of columns in binary."""

    blocks: tuple[Block, ...]

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        return torch.cat([block.dense() for block in self.blocks], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors; the module docstring says what they are."""
        salient_I = torch.cat([block.salient_B for block in self.blocks])
        sign_OI, residual_OI, mark_OI = (
            torch.cat([getattr(block, name) for block in self.blocks], dim=1)
            for name in ("sign_OB", "residual_OB", "mark_OB")
        )
        return {
            "weight_columns": binary.pack_flat(salient_I),
            "weight_signs": sparse.pack_bits(sign_OI),
            "weight_residual": binary.pack_flat(residual_OI[:, salient_I].flatten()),
            "weight_marks": binary.pack_flat(mark_OI[:, ~salient_I].flatten()),
            "weight_levels": torch.stack([block.levels_O8 for block in self.blocks], dim=1).to(torch.bfloat16),
            "weight_shape": torch.tensor(sign_OI.shape, dtype=torch.int64),
        }


def salient_columns(weight_OB: Tensor, order_B: Tensor, most: int) -> Tensor:
    """Return the mask of salient columns: the first k of `order_B`, with the k whose block error is least."""

    def mask(count: int) -> Tensor:
        return torch.zeros_like(order_B, dtype=torch.bool).index_fill_(0, order_B[:count], value=True)

    def error(salient_B: Tensor) -> float:
        twice_OB, once_OB = _twice(weight_OB, salient_B), binary.fit(weight_OB, (~salient_B).expand_as(weight_OB))
        dense_OB = torch.where(salient_B, sum(part.dense() for part in twice_OB), once_OB.dense())
        return float((dense_OB - weight_OB).square().sum())

    limit = min(most, len(order_B) - 1)
    candidates = [mask(count) for count in range(min(1, limit), limit + 1)]
    return min(candidates, key=error)


def split_by_size(weight_OB: Tensor, other_B: Tensor) -> Tensor:
    """Return the marks of large weights [O, B] among the columns of `other_B`, at the threshold of least error."""
    magnitude_OB = weight_OB[:, other_B].abs()
    ranks = torch.tensor(_PERCENTILES, dtype=magnitude_OB.dtype, device=magnitude_OB.device)
    ordered = magnitude_OB.flatten().sort().values
    thresholds = ordered[(ranks * (len(ordered) - 1)).round().long()].unique()

    def error(mark_OB: Tensor) -> float:
        dense_OB = torch.zeros_like(magnitude_OB)
        for member_OB in (mark_OB, ~mark_OB):
            dense_OB = torch.where(member_OB, binary.fit(weight_OB[:, other_B], member_OB).dense(), dense_OB)
        return float((dense_OB - weight_OB[:, other_B]).square().sum())

    marks_OI = torch.zeros_like(weight_OB, dtype=torch.bool)
    marks_OI[:, other_B] = min((magnitude_OB >= threshold for threshold in thresholds), key=error)
    return marks_OI


def binarize(weight_OB: Tensor, salient_B: Tensor, mark_OB: Tensor, *, residual: bool = True) -> Block:
    """Return a block in binary with given salient columns and marks."""
    first, second = _twice(weight_OB, salient_B)
    other_OB = (~salient_B).expand_as(weight_OB)
    small, large = (binary.fit(weight_OB, other_OB & member_OB) for member_OB in (~mark_OB, mark_OB))
    sign_OB = torch.where(salient_B, first.sign_OS, torch.where(mark_OB, large.sign_OS, small.sign_OS))
    numbers = [value for part in (first, second, small, large) for value in (part.mean_O, part.amplitude_O)]
    levels_O8 = torch.stack(numbers, dim=-1)
    if not residual:
        levels_O8[:, 2:4] = 0.0
    return Block(salient_B, sign_OB, second.sign_OS, mark_OB & ~salient_B, levels_O8)


def binarize_blocks(
    weight_OI: Tensor, statistics: Statistics, config: Config, ablation: Ablation = "", counts: Sequence[int] = ()
) -> BlocksPacked:
    """Return the weight binarized block after block, with one idea taken out where `ablation` names it.

    Args:
        weight_OI: the weight.
        statistics: with its second moment.
        config: parameters.
        ablation: what is left out.
        counts: salient columns of each block; empty: as many as make its error least.
    """
    hessian_II = statistics.second_moment("billm", weight_OI.shape[1])
    factor_II = obs.inverse_factor(obs.damped(hessian_II, statistics.tokens, config.damp))
    current_OI, blocks = weight_OI.double().clone(), list[Block]()
    for first in range(0, weight_OI.shape[1], config.block):
        span = slice(first, first + config.block)
        weight_OB, factor_BB = current_OI[:, span], factor_II[span, span]
        fixed = counts[len(blocks)] if counts else 0
        blocks.append(_block(weight_OB.float(), factor_BB.diagonal().float(), config, ablation, fixed))
        if ablation != "uncompensated":
            error_OB = correction(weight_OB - blocks[-1].dense(), factor_BB, config.correction)
            current_OI[:, span.stop :] -= error_OB @ factor_II[span, span.stop :]
    return BlocksPacked(tuple(blocks))


def correction(error_OB: Tensor, factor_BB: Tensor, kind: str) -> Tensor:
    """Return the errors [O, B] in the units of the OBS update, of which U[B, rest] takes each to later columns."""
    if kind == "elementwise":
        return error_OB / factor_BB.diagonal()
    return torch.linalg.solve_triangular(factor_BB, error_OB, upper=True, left=False)


def _block(weight_OB: Tensor, inverse_B: Tensor, config: Config, ablation: Ablation, count: int) -> Block:
    salience_B = (weight_OB / inverse_B).square().sum(0)
    if ablation == "random_columns":
        salience_B = sparse.random_score(salience_B)
    order_B = torch.argsort(salience_B, descending=True, stable=True)
    if count:
        salient_B = torch.zeros_like(order_B, dtype=torch.bool).index_fill_(0, order_B[:count], value=True)
    else:
        salient_B = salient_columns(weight_OB, order_B, config.most_salient)
    mark_OB = torch.zeros_like(weight_OB, dtype=torch.bool)
    if ablation != "no_split":
        mark_OB = split_by_size(weight_OB, ~salient_B)
    return binarize(weight_OB, salient_B, mark_OB, residual=ablation != "no_residual")


def _twice(weight_OB: Tensor, salient_B: Tensor) -> tuple[binary.Binary, binary.Binary]:
    """Return the binary approximation of the salient columns and that of what it leaves over."""
    member_OB = salient_B.expand_as(weight_OB)
    first = binary.fit(weight_OB, member_OB)
    return first, binary.fit(weight_OB - first.dense(), member_OB)


def _two_values(level_O2: Tensor, sign_OB: Tensor) -> Tensor:
    return binary.two_values(level_O2[:, :1], level_O2[:, 1:], sign_OB)


class Method(WeightMethod[Config], config=Config):
    """BiLLM."""

    bits: ClassVar[str] = "about 3, as stored"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = (
        "Huang et al. 2024, BiLLM: Pushing the Limit of Post-Training Quantization for LLMs (arXiv 2402.04291)"
    )

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the binarized weight.

        Raises:
            ValueError: no usable second moment.
        """
        return binarize_blocks(weight_OI, statistics, config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        rows, columns = tensors["weight_shape"].tolist()
        salient_I = binary.unpack_flat(tensors["weight_columns"], columns)
        sign_OI = sparse.unpack_bits(tensors["weight_signs"], columns)
        residual_OI, mark_OI = torch.zeros_like(sign_OI), torch.zeros_like(sign_OI)
        count = int(salient_I.sum())
        residual_OI[:, salient_I] = binary.unpack_flat(tensors["weight_residual"], rows * count).view(rows, count)
        mark_OI[:, ~salient_I] = binary.unpack_flat(tensors["weight_marks"], rows * (columns - count)).view(rows, -1)
        parts = [planes.split(config.block, dim=-1) for planes in (salient_I, sign_OI, residual_OI, mark_OI)]
        return BlocksPacked(tuple(map(Block, *parts, tensors["weight_levels"].float().unbind(1))))

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
        """Return the method with one idea taken out, in the same storage with as many salient columns."""
        counts = [int(block.salient_B.sum()) for block in binarize_blocks(weight_OI, statistics, config).blocks]
        ablations: list[Ablation] = ["random_columns", "no_residual", "no_split"]
        ablations += ["uncompensated"] if len(counts) > 1 else []
        return {name: binarize_blocks(weight_OI, statistics, config, name, counts) for name in ablations}
