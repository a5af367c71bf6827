"""An integer variant that multiplies in integers on the CPU: the loader that makes 8 bits faster, not only smaller.

Plain transformers unpacks an integer variant to float32 and is as slow as its base model. Here every packed layer
keeps its codes, rounds its input to int8 with one scale a token (symmetric, from the largest magnitude), and multiplies
with `torch._int_mm`, whose oneDNN kernel sums int8 products in 32 bits. That is faster than float32 where the CPU does
so in one instruction (AVX512-VNNI, AVX-VNNI, AMX, Arm dot product); `tests/bench/bench_int8.py` measures it. Chosen
among torch's integer paths for being the fastest at one token and the most accurate (a scale a token, not a tensor).

    from pipelines.deploy.int8_inference import load_model
    model = load_model(Path("variant/model"))
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.compression.base import Packed
from models.compression.formats.int_grid import IntPacked
from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model as load_float

_LARGEST = 127
_TINY = 1e-12


def round_tokens(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [N, D] and the scale of each token [N, 1], float32."""
    scale_N1 = x_ND.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / _LARGEST
    return (x_ND / scale_N1).round_().to(torch.int8), scale_N1


class Int8Linear(nn.Module):
    """A linear layer in integers: `y = (codes(x) @ codes(W)^T) * scale(x) * scale(W) + b`.

    Args:
        codes_OI: int8 weight codes.
        scale_O: float32 scale of each row.
        bias_O: added in float32.
    """

    codes_IO: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = codes_OI.shape[1], codes_OI.shape[0]
        self.register_buffer("codes_IO", codes_OI.contiguous().t())
        self.register_buffer("scale_O", scale_O)
        self.register_buffer("bias_O", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [..., O] of inputs [..., I]."""
        codes_NI, scale_N1 = round_tokens(x.reshape(-1, self.in_features).float())
        sums_NO = torch._int_mm(codes_NI, self.codes_IO)  # noqa: SLF001 - it has no public name yet
        y_NO = sums_NO.float().mul_(scale_N1).mul_(self.scale_O)
        if self.bias_O is not None:
            y_NO += self.bias_O
        return y_NO.to(x.dtype).view(*x.shape[:-1], self.out_features)


def load_model(path: Path) -> PreTrainedModel:
    """Return the model of an integer variant, its packed layers computing in int8; everything else stays float32.

    Args:
        path: model folder of a variant with whole-row scales and no zero points (`group_size = 0`, `symmetric = true`).

    Raises:
        ConfigError: nothing is packed, or a layer is not packed so.
    """
    reader, model = WeightReader(path), load_float(path)
    names = reader.modules()
    if not names:
        raise ConfigError(f"{path} has no packed layers", hint='compress with {method = "rtn", bits = 8}')
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            continue
        packed = reader.packed(name)
        codes_OI, scale_O = _codes(name, packed)
        bias = getattr(layer, "bias", None)
        model.set_submodule(name, Int8Linear(codes_OI, scale_O, None if bias is None else bias.detach().float()))
    return model.eval()


def _codes(name: str, packed: Packed) -> tuple[Tensor, Tensor]:
    if not isinstance(packed, IntPacked) or packed.grid.zero_OG is not None or packed.grid.scale_OG.shape[1] != 1:
        raise ConfigError(
            f"{name} is not packed as integers with one scale a row",
            hint='compress with {method = "rtn" or "gptq", bits = 8, group_size = 0, symmetric = true}',
        )
    return packed.codes_OI, packed.grid.scale_OG[:, 0].float()
