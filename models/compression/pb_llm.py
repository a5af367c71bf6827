"""PB-LLM: the most salient weights of a layer in 8 bits, all others in one, the errors compensated as in GPTQ.

Stored for a layer, with r salient weights a weight: 8 r for their codes, 1 - r for the signs of the others, 1 for the
bitmap that tells them apart (2.7 bits at r = 0.1), and three bfloat16 numbers for each row and group. Read by our
loader: `weight_bitmask` uint8 [O, I/8] lowest bit first, `weight_codes` int8 [salient] and `weight_signs` packed bits,
both in row order, `weight_scale`, `weight_mean` and `weight_amplitude` [O, G], `weight_shape`.

Beside the released code: means over the binary weights only (its rows are averaged over all columns, salient ones
counted as zero, which makes the amplitude too small), groups that are fitted before the first column is visited, and
room for salient weights to grow, because they absorb most of what the binary ones lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from models.compression.base import Calibration, MethodConfig, Packed, Statistics, WeightMethod
from models.compression.formats import binary, sparse
from models.compression.formats.int_grid import group_for, grouped
from models.compression.solvers import obs
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


_ROOM = 1.5
"""Range of the salient codes over the largest salient weight."""


class Config(MethodConfig):
    """Parameters of PB-LLM."""

    salient: float = Field(0.1, ge=0.0, le=0.9, description="share of weights that keep 8 bits")
    salience: Literal["magnitude", "hessian"] = Field(
        "magnitude", description="what makes a weight salient: |w|, or the OBS cost of losing it"
    )
    group_size: int = Field(0, ge=0, le=65536, description="columns that share their numbers; 0: the whole row")
    damp: float = Field(
        0.01, gt=0.0, le=10.0, description="ridge on the second moment, as a share of its mean diagonal"
    )

    @property
    def label(self) -> str:
        """For instance `10`, `30-hessian-g128`."""
        parts = [f"{self.salient * 100:g}".replace(".", "p")]
        parts += ["hessian"] if self.salience == "hessian" else []
        return "-".join([*parts, *([f"g{self.group_size}"] if self.group_size else [])])


class Levels(NamedTuple):
    """What the weights of each row and group [O, G] may become, float32, exact in bfloat16."""

    scale_OG: Tensor
    mean_OG: Tensor
    amplitude_OG: Tensor

    def column(self, group: int) -> Levels:
        """Return the levels of one group, [O]."""
        return Levels(*(values_OG[:, group] for values_OG in self))


@dataclass(frozen=True)
class MixedPacked(Packed):
    """8-bit codes and signs, told apart by a bitmap."""

    salient_OI: Tensor
    """bool."""
    codes: Tensor
    """int8 [salient], row order."""
    signs: Tensor
    """bool [others], row order."""
    levels: Levels

    def dequantize(self) -> Tensor:
        """Return the weight [O, I], float32."""
        size = self.salient_OI.shape[1] // self.levels.scale_OG.shape[1]
        scale_OI, mean_OI, amplitude_OI = (values.repeat_interleave(size, dim=1) for values in self.levels)
        dense_OI = torch.empty(self.salient_OI.shape, device=self.salient_OI.device)
        dense_OI[self.salient_OI] = self.codes.float() * scale_OI[self.salient_OI]
        others_OI = ~self.salient_OI
        dense_OI[others_OI] = binary.two_values(mean_OI[others_OI], amplitude_OI[others_OI], self.signs)
        return dense_OI

    def to(self, device: torch.device) -> MixedPacked:
        """Return the same on another device."""
        salient_OI, codes, signs = (tensor.to(device) for tensor in (self.salient_OI, self.codes, self.signs))
        return MixedPacked(salient_OI, codes, signs, Levels(*(values_OG.to(device) for values_OG in self.levels)))

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors; the module docstring says what they are."""
        return {
            "weight_bitmask": sparse.pack_bits(self.salient_OI),
            "weight_codes": self.codes.contiguous(),
            "weight_signs": binary.pack_flat(self.signs),
            "weight_scale": self.levels.scale_OG.to(torch.bfloat16),
            "weight_mean": self.levels.mean_OG.to(torch.bfloat16),
            "weight_amplitude": self.levels.amplitude_OG.to(torch.bfloat16),
            "weight_shape": torch.tensor(self.salient_OI.shape, dtype=torch.int64),
        }


class _Mixed:
    """The mixed quantizer of columns: mask and levels are fixed before the first visit."""

    def __init__(self, salient_OI: Tensor, levels: Levels) -> None:
        self._salient_OI, self._levels = salient_OI, levels
        self._size = salient_OI.shape[1] // levels.scale_OG.shape[1]

    def begin(self, first: int, weight_OB: Tensor, inverse_B: Tensor) -> None:
        """Need nothing: mask and levels are fixed."""

    def __call__(self, position: int, weight_O: Tensor) -> Tensor:
        scale_O, mean_O, amplitude_O = self._levels.column(position // self._size)
        code_O = _codes(weight_O, scale_O) * scale_O.double()
        other_O = binary.two_values(mean_O, amplitude_O, weight_O >= mean_O).double()
        return torch.where(self._salient_OI[:, position], code_O, other_O)


def score(weight_OI: Tensor, hessian_II: Tensor, salience: str) -> Tensor:
    """Return what makes weights salient: |w|, or w^2 / U_jj^2 with H^-1 = U^T U."""
    if salience == "magnitude":
        return weight_OI.abs()
    return (weight_OI.double() / obs.inverse_factor(hessian_II).diagonal()).square()


def highest(score_OI: Tensor, share: float) -> Tensor:
    """Return the mask of the highest `share` of a layer's scores."""
    return ~sparse.keep_share(-score_OI.reshape(1, -1), share).view(score_OI.shape)


def fit(weight_OI: Tensor, salient_OI: Tensor, config: Config) -> Levels:
    """Return the levels of every row and group."""
    groups = weight_OI.shape[1] // group_for(weight_OI.shape[1], config.group_size)
    weight_OGS, salient_OGS = grouped(weight_OI.float(), groups), grouped(salient_OI, groups)
    mean_OG = binary.bfloat(binary.masked_mean(weight_OGS, ~salient_OGS))
    spread_OGS = (weight_OGS - mean_OG.unsqueeze(-1)).abs()
    amplitude_OG = binary.bfloat(binary.masked_mean(spread_OGS, ~salient_OGS))
    scale_OG = binary.bfloat((weight_OGS.abs() * salient_OGS).amax(-1) * (_ROOM / 127))
    return Levels(torch.where(scale_OG > 0, scale_OG, 1.0), mean_OG, amplitude_OG)


def pack(weight_OI: Tensor, salient_OI: Tensor, levels: Levels) -> MixedPacked:
    """Return every weight rounded alone: salient ones to their codes, the others to the nearer of two values."""
    size = weight_OI.shape[1] // levels.scale_OG.shape[1]
    scale_OI, mean_OI, _ = (values.repeat_interleave(size, dim=1) for values in levels)
    codes_OI, sign_OI = _codes(weight_OI, scale_OI), weight_OI >= mean_OI
    return MixedPacked(salient_OI, codes_OI[salient_OI].to(torch.int8), sign_OI[~salient_OI], levels)


def _compensated(weight_OI: Tensor, hessian_II: Tensor, salient_OI: Tensor, config: Config) -> Packed:
    levels = fit(weight_OI, salient_OI, config)
    return pack(obs.compensate(weight_OI, hessian_II, _Mixed(salient_OI, levels)), salient_OI, levels)


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-127, 127)


class Method(WeightMethod[Config], config=Config):
    """PB-LLM."""

    bits: ClassVar[str] = "about 2 + 7 x share of salient weights"
    calibration: ClassVar[Calibration] = "hessian"
    paper: ClassVar[str] = "Shang et al. 2023, PB-LLM: Partially Binarized Large Language Models (arXiv 2310.00034)"

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> Packed:
        """Return the partially binarized weight.

        Raises:
            ValueError: no usable second moment.
        """
        hessian_II = obs.damped(statistics.second_moment("pb_llm", weight_OI.shape[1]), statistics.tokens, config.damp)
        salient_OI = highest(score(weight_OI, hessian_II, config.salience), config.salient)
        return _compensated(weight_OI, hessian_II, salient_OI, config)

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:  # noqa: ARG002
        """Rebuild a packed weight from its stored tensors."""
        rows, columns = tensors["weight_shape"].tolist()
        salient_OI = sparse.unpack_bits(tensors["weight_bitmask"], columns)
        codes = tensors["weight_codes"]
        signs = binary.unpack_flat(tensors["weight_signs"], rows * columns - len(codes))
        levels = (tensors[f"weight_{name}"].float() for name in ("scale", "mean", "amplitude"))
        return MixedPacked(salient_OI, codes, signs, Levels(*levels))

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: Config) -> dict[str, Packed]:
        """Return random salient weights, compensated; and the method's own choice, each weight rounded alone."""
        hessian_II = obs.damped(statistics.second_moment("pb_llm", weight_OI.shape[1]), statistics.tokens, config.damp)
        random_OI = highest(sparse.random_score(weight_OI), config.salient)
        salient_OI = highest(score(weight_OI, hessian_II, config.salience), config.salient)
        alone = pack(weight_OI.float(), salient_OI, fit(weight_OI, salient_OI, config))
        baselines: dict[str, Packed] = {"rtn": alone}
        return baselines | (
            {"random": _compensated(weight_OI, hessian_II, random_OI, config)} if config.salient else {}
        )
