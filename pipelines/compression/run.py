"""One compression while it runs: the base model, opened once, and what every driver needs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.architectures.config import Family
from pipelines.compression import calibration, quick_eval
from pipelines.compression.calibration import Batch
from pipelines.compression.config import CompressConfig
from pipelines.compression.quick_eval import QuickEval
from pipelines.core.artifact import Artifact
from pipelines.core.compute import torch_device
from pipelines.core.errors import ConfigError
from pipelines.core.stage import Progress, StageContext, StageFunction
from pipelines.modelio import description, meta_init
from pipelines.modelio.description import Description
from pipelines.modelio.folder import WeightReader, family_of
from pipelines.modelio.load import load_weights


@dataclass(frozen=True)
class CompressionRun:
    """What a driver is given. Everything that computes runs on `device`."""

    config: CompressConfig
    inputs: Mapping[str, Artifact]
    out_dir: Path
    context: StageContext
    compress: StageFunction
    """The whole stage, for drivers that make other variants on the way: candidates of a search, baselines."""
    device: torch.device
    base: PreTrainedModel
    """The base model with its parameters on the meta device; drivers load blocks into it and release them."""
    reader: WeightReader
    """The weights of the base model."""

    @classmethod
    def open(
        cls,
        config: CompressConfig,
        inputs: Mapping[str, Artifact],
        out_dir: Path,
        context: StageContext,
        compress: StageFunction,
    ) -> Self:
        """Open the base model of a compression.

        Raises:
            ConfigError: the machine has no device as wanted.
            IntegrityError: the base model is damaged.
            NumericError: a weight of the base model is not finite.
        """
        source = inputs["model"].path / "model"
        reader = WeightReader(source)
        reader.refuse_not_finite()
        device = torch_device(context.compute)
        return cls(config, inputs, out_dir, context, compress, device, meta_init.build(source), reader)

    @property
    def source(self) -> Path:
        """Model folder of the base."""
        return self.reader.folder

    @property
    def target(self) -> Path:
        """Model folder of the variant."""
        return self.out_dir / "model"

    @property
    def prepare(self) -> Path:
        """Folder of the prepared data."""
        return self.inputs["prepare"].path

    @property
    def base_weights(self) -> int:
        """Number of weights of the base model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.base.parameters())

    @property
    def fisher(self) -> Path:
        """Folder of the squared gradients, once `sensitivity.record` has made it."""
        return self.context.scratch / "fisher"

    @property
    def masked(self) -> bool:
        """Whether the model predicts masked tokens, not the next one."""
        return self.family == "encoder"

    @property
    def family(self) -> Family:
        """Family of the base model."""
        return family_of(self.source)

    @cached_property
    def description(self) -> Description:
        """The parts of the base model."""
        return description.of_folder(self.source)

    @cached_property
    def tokens_NT(self) -> NDArray[np.int64]:  # noqa: N802 - shape letters
        """Packed calibration sequences; what is hidden from an encoder is hidden in them."""
        return calibration.sample_tokens(
            self.prepare, samples=self.config.samples, seed=self.config.seed, masked=self.masked
        )

    @cached_property
    def labels_NT(self) -> NDArray[np.int64]:  # noqa: N802 - shape letters
        """What the model should say at each position of `tokens_NT`."""
        return calibration.labels(self.prepare, self.tokens_NT, seed=self.config.seed, masked=self.masked)

    @cached_property
    def text(self) -> list[Batch]:
        """The documents in `tokens_NT`, with what the model should say of them."""
        return calibration.batches(self.prepare, self.tokens_NT, self.labels_NT)

    def refuse_rounded_inputs(self) -> None:
        """Refuse a base whose layers round their inputs: its weights alone are not what it computes.

        Raises:
            ConfigError: naming the first such layer.
        """
        for name in self.reader.rounding():
            raise ConfigError(
                f"{self.config.method} cannot start from this base: {name} rounds its inputs, which another method "
                "would forget",
                hint="quantize inputs last: start from the base of that variant",
            )

    def weight(self, name: str) -> Tensor:
        """Return the weight [O, I] of a layer of the base, float32, on the device of the run."""
        stored = meta_init.as_in_memory(self.base, f"{name}.weight", self.reader.dense(f"{name}.weight"))
        return stored.to(self.device).float()

    def load_base(self) -> PreTrainedModel:
        """Return the whole base model, on the device of the run."""
        return load_weights(self.source).to(self.device)

    def quick_eval(self, documents: int, end: Literal["first", "last"]) -> QuickEval | None:
        """Return validation text to judge models on; None where there is too little. See `quick_eval.build`."""
        return quick_eval.build(self.prepare, documents, self.family, self.device, end=end)

    def progress(self, done: int, total: int, unit: str, message: str = "") -> None:
        """Report how far the compression is."""
        self.context.report(Progress(self.context.node, done, total, unit, message))
