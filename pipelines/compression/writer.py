"""The model folder of one variant while it is written: packed layers, everything else, then config and record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from models.compression import registry
from models.compression.base import MethodConfig, Packed, Statistics
from models.compression.formats.int_grid import GridConfig
from pipelines.compression.config import CompressConfig
from pipelines.compression.report import PackedLayer, Totals
from pipelines.compression.run import CompressionRun
from pipelines.modelio import folder, layout, meta_init
from pipelines.modelio.folder import WeightReader, WeightWriter


class VariantWriter:
    """Writes a variant's model folder tensor by tensor.

    Args:
        model: the base model; only its structure is read.
        reader: the weights of what is not packed.
        target: folder to write.
        config: configuration of the variant.
        parameters: the method's parameters as they were used.
        dense: plain transformers unpacks the variant while loading it.
        private: no public layout fits the variant as a whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: WeightReader,
        target: Path,
        *,
        config: CompressConfig,
        parameters: MethodConfig,
        dense: bool,
        private: bool = False,
    ) -> None:
        target.mkdir(parents=True, exist_ok=True)
        self._model, self._reader, self._target = model, reader, target
        self._config, self._parameters, self._dense, self._private = config, parameters, dense, private
        self._writer: WeightWriter | None = None
        self._schemes: dict[str, dict[str, Any] | None] = {}
        self._record: dict[str, dict[str, Any]] = {}
        self.embedding_bytes = 0
        """Stored bytes of the token matrices."""

    @property
    def layout(self) -> str:
        """Name of the layout."""
        return layout.LAYOUT_PRIVATE if None in self._schemes.values() else layout.LAYOUT_PUBLIC

    def add(self, name: str, packed: Packed, parameters: MethodConfig | None = None) -> Packed:
        """Store one packed layer, with its own parameters if it has any; returns it as stored."""
        return self._pack(name, packed, self._config.method, (parameters or self._parameters).for_layer(name))

    def close(self) -> None:
        """Store every parameter that is not packed, then config, record and companions."""
        names = token_matrices(self._model, self._reader)
        if self._config.embeddings == "quantize":
            for name in names:
                self._quantize_embedding(name)
        matrices = {f"{name}.weight" for name in names}
        for name in self._reader.names():
            if name.endswith(".weight") and name.removesuffix(".weight") in self._schemes:
                continue
            tensor = self._reader.dense(name)
            if name in matrices:
                tensor = tensor.to(torch.bfloat16) if self._config.embeddings == "bfloat16" else tensor
                self.embedding_bytes += tensor.nbytes
            self._weights().add(name, tensor)
        self._weights().close()
        public = {name: scheme for name, scheme in self._schemes.items() if scheme is not None}
        quantization = None
        if public and len(public) == len(self._schemes):
            quantization = layout.quantization_config(self._model, public, dense=self._dense)
        layout.finish(self._reader.folder, self._target, self._record, quantization)

    def _quantize_embedding(self, name: str) -> None:
        """Store a token matrix on the grid of the other layers, rounded to nearest."""
        rtn = registry.weight("rtn")
        parameters = rtn.Config.model_validate(self._parameters.model_dump(include=set(GridConfig.model_fields)))
        packed = rtn.compress(self._reader.dense(f"{name}.weight").float(), Statistics(), parameters)
        self.embedding_bytes += self._pack(name, packed, "rtn", parameters).stored_bits() // 8

    def _pack(self, name: str, packed: Packed, method: str, parameters: MethodConfig) -> Packed:
        stored = packed.widened() if self._dense else packed
        self._schemes[name] = None if self._private else layout.group(stored, dense=self._dense)
        turned = isinstance(self._model.get_submodule(name), meta_init.TransposedLinear)
        self._record[name] = {"method": method, "config": parameters.model_dump(mode="json")}
        self._record[name] |= {"transposed": True} if turned else {}
        for leaf, tensor in stored.tensors().items():
            self._weights().add(f"{name}.{leaf}", tensor)
        return stored

    def _weights(self) -> WeightWriter:
        if self._writer is None:
            private = self.layout == layout.LAYOUT_PRIVATE
            self._writer = WeightWriter(self._target, folder.PACKED_STEM if private else folder.PUBLIC_STEM)
        return self._writer


def token_matrices(model: PreTrainedModel, reader: WeightReader) -> list[str]:
    """Return the module names of the token embedding and, where the folder holds its own, of the output matrix."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    stored = set(reader.names())
    names = [n for n, m in model.named_modules() if id(m) in ends and isinstance(m, nn.Embedding | nn.Linear)]
    return [name for name in names if f"{name}.weight" in stored]


def totals(run: CompressionRun, rows: Mapping[str, PackedLayer], *, embedding_bytes: int) -> Totals:
    """Return bits and bytes of the packed layers and of all weight files, beside the base's."""
    base = run.reader
    weights = sum(row.shape[0] * row.shape[1] for row in rows.values())
    stored = sum(row.stored_bits for row in rows.values())
    dense = sum(base.dense_bytes(f"{name}.weight") for name in rows)
    files = WeightReader(run.target).bytes
    return Totals(
        layers=len(rows),
        weights=weights,
        stored_bits=stored,
        bits_per_weight=stored / weights,
        model_bits_per_weight=8 * files / run.base_weights,
        layer_bytes=stored // 8,
        base_layer_bytes=dense,
        layer_ratio=8 * dense / stored,
        embedding_bytes=embedding_bytes,
        bytes=files,
        base_bytes=base.bytes,
        ratio=base.bytes / files,
    )
