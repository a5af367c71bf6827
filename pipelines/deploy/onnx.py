"""ONNX: a folder for onnxruntime (the encoder only), with float32 or int8 arithmetic.

    model.onnx   `input_ids`, `attention_mask` int64 [batch, tokens] -> `logits` float32 [batch, tokens, vocabulary]
    config.json, tokenizer.json, ...   as in the model folder

With int8 every matrix is stored as int8 with one scale a row and multiplied in integers; activations are rounded to
uint8 with one scale a batch, found while running (onnxruntime's dynamic quantization). That is faster than float32
where the CPU multiplies int8 in one instruction (AVX512-VNNI, AVX-VNNI, AMX, Arm dot product); `reduced` says that this
CPU does not, and weights then keep 7 bits so that AVX2's 16-bit sums cannot overflow.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import copy_companions, family_of
from pipelines.modelio.load import load_model

Precision = Literal["fp32", "int8"]
MODEL = "model.onnx"
_LONGEST_BATCH = 1 << 16
_INT8_DOT_PRODUCT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Flags of /proc/cpuinfo, any of which sums int8 products in 32 bits."""


class _Logits(nn.Module):
    """A model as a function of two tensors, which is what an ONNX graph is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, float [B, T, vocabulary]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def write(model: Path, target: Path, precision: Precision = "fp32") -> None:
    """Write an encoder's folder as an ONNX folder.

    Args:
        model: model folder, in any layout of this project.
        target: an empty folder.
        precision: arithmetic of the matrix products.

    Raises:
        ConfigError: no encoder.
    """
    loaded = load_model(model)
    if family_of(model) != "encoder":
        raise ConfigError(
            f"{type(loaded).__name__} cannot be written as ONNX: a graph without a key and value cache would compute "
            "every token anew",
            hint="`ingot export --format gguf` writes decoders",
        )
    path = target / MODEL
    _export(loaded.float(), path)
    if precision == "int8":
        quantize(path)
    copy_companions(model, target)


def reduced() -> bool:
    """Return whether this CPU lacks an int8 dot product, so that int8 weights have to keep 7 bits."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    return not words & _INT8_DOT_PRODUCT


def _export(model: Any, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=_LONGEST_BATCH)
    tokens = torch.export.Dim("tokens", min=2, max=model.config.max_position_embeddings)
    ids = torch.zeros(2, min(16, model.config.max_position_embeddings), dtype=torch.long)
    with warnings.catch_warnings(), _quiet(logging.getLogger("torch.onnx")):
        warnings.simplefilter("ignore")  # of the exporter, about its own names and trees
        program = torch.onnx.export(
            _Logits(model).eval(),
            (ids, torch.ones_like(ids)),
            dynamo=True,
            dynamic_shapes={name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")},
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)


def quantize(path: Path) -> None:
    """Replace a float graph by one with int8 matrices, in place; a token matrix that is shared stays float."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_suffix(".float")
    path.rename(whole)
    with _quiet(logging.getLogger()):
        quantize_dynamic(
            whole,
            path,
            per_channel=True,
            reduce_range=reduced(),
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
    whole.unlink()


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Let a library's logger say errors only, inside the block."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
