"""torchao: a transformers folder whose matrices are torchao's tensors: read without any of our code.

Integers that a variant has are taken over code by code: int8 with one scale a row as `Int8Tensor`, which multiplies
without unpacking, everything else (groups, zero points) as `IntxUnpackedToInt8Tensor`, which keeps a byte for each code
of 2 to 8 bits. Other matrices are rounded, to what `precision` names:

    int8          one scale a row
    int8-dynamic  the same, and the inputs of these layers are rounded to int8 with one scale a token
    int4          groups of 32; a byte for each code

torchao 0.18 packs two 4-bit codes into a byte on accelerators only: on a CPU its formats `plain` and `preshuffled` end
with "Requires mslk >= 1.0.0", `plain_int32` with "does not support device 'cpu' yet", and `tile_packed_to_4d` is for
bfloat16 on CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.compression import rtn
from models.compression.base import Packed, Statistics
from models.compression.formats.int_grid import IntPacked
from models.compression.formats.quantized_input import InputPacked
from pipelines.compression import sequential
from pipelines.core.artifact import read_json
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader, copy_companions, write_json

Precision = Literal["int8", "int8-dynamic", "int4"]
GROUP = 32
"""Weights that share a scale where `int4` rounds; fewer where it does not divide a row."""


def write(model: Path, target: Path, precision: Precision = "int8") -> dict[str, int]:
    """Write a model folder in torchao's tensors; it is in memory as a whole.

    Args:
        model: model folder, in any layout of this project.
        target: an empty folder.
        precision: how matrices are rounded that are not integers yet.

    Returns:
        Number of matrices: `taken over` and `rounded`.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    plain, reader = meta_init.build(model), WeightReader(model)
    names, packed = sequential.targets(plain, ()), set(reader.modules())
    state: dict[str, Tensor] = {}
    used = {"taken over": 0, "rounded": 0}
    for name in reader.names():
        module = name.removesuffix(".weight")
        if module not in names:
            state[name] = reader.dense(name)
            continue
        codes = integers(reader.packed(module)) if module in packed else None
        used["rounded" if codes is None else "taken over"] += 1
        if codes is None:
            codes = rounded(reader.dense(name).float(), precision)
        state[name] = taken(codes, dynamic=precision == "int8-dynamic")
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / "model.safetensors", metadata)
    _configure(model, target, plain, names, precision)
    return used


def rounds_same_inputs(packed: Packed, precision: str) -> bool:
    """Return whether a layer's inputs are rounded in the export as they are in the variant."""
    same = isinstance(packed, InputPacked) and packed.scale is None and packed.bits == 8
    codes = integers(packed)
    return same and precision == "int8-dynamic" and codes is not None and _whole_rows(codes)


def integers(packed: Packed) -> IntPacked | None:
    """Return a matrix as codes on a grid, if it is one."""
    weight = packed.weight if isinstance(packed, InputPacked) else packed
    return weight if isinstance(weight, IntPacked) else None


def taken(packed: IntPacked, *, dynamic: bool) -> Tensor:
    """Return a torchao tensor of the very same codes and scales.

    Args:
        packed: codes on a grid of any groups.
        dynamic: round inputs to int8, where the codes have one scale a row.
    """
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    scale_OG, zero_OG = packed.grid.scale_OG.float(), packed.grid.zero_OG
    block = [1, packed.codes_OI.shape[1] // scale_OG.shape[1]]
    codes_OI = packed.codes_OI.to(torch.int8).contiguous()
    if _whole_rows(packed):
        return Int8Tensor(codes_OI, scale_OG, block, torch.float32, act_quant_kwargs=_inputs() if dynamic else None)
    zero = torch.zeros_like(scale_OG, dtype=torch.int8) if zero_OG is None else zero_OG.to(torch.int8)
    target = getattr(torch, f"int{packed.grid.bits}")
    return IntxUnpackedToInt8Tensor(codes_OI, scale_OG, zero, target, tuple(block), torch.float32, None)


def rounded(weight_OI: Tensor, precision: Precision) -> IntPacked:
    """Return a float matrix [O, I] rounded to the nearest point of the precision's grid."""
    grid: dict[str, Any] = {"bits": 4, "group_size": GROUP} if precision == "int4" else {"bits": 8, "group_size": 0}
    packed = rtn.Method().compress(weight_OI, Statistics(), rtn.Config.model_validate(grid))
    codes = integers(packed)
    assert codes is not None
    return codes


def _whole_rows(packed: IntPacked) -> bool:
    return packed.grid.scale_OG.shape[1] == 1 and packed.grid.zero_OG is None


def _inputs() -> Any:
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    return QuantizeTensorToInt8Kwargs(granularity=PerRow())


def _configure(model: Path, target: Path, plain: nn.Module, names: list[str], precision: Precision) -> None:
    """Write config and companions; readers take the type of each tensor from the weight file, not from here."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from transformers import TorchAoConfig

    four_bits: Any = {"weight_dtype": vars(torch)["int4"], "granularity": PerGroup(GROUP)}
    kind = {
        "int8": Int8WeightOnlyConfig(),
        "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
        "int4": IntxWeightOnlyConfig(**four_bits),
    }[precision]
    left = [n for n, module in plain.named_modules() if isinstance(module, nn.Linear) and n not in names]
    copy_companions(model, target)
    config = read_json(model / "config.json")
    config["quantization_config"] = TorchAoConfig(kind, modules_to_not_convert=left).to_dict()
    write_json(target / "config.json", config | {"dtype": "float32"})
