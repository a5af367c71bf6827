"""LQ-LoRA fine-tuning: the base frozen in NormalFloat, only the low-rank adapters train.

`init_from = "lq"` splits each weight into base and adapter as `lq_lora` does without weighting: the adapter takes the
largest directions of the weight before anything is rounded. Both follow from the
weight alone; `"zero"` is QLoRA: the weight rounded alone beside an adapter that begins at nothing (its
right factor is random, its left zero). Embeddings, norms and the base keep their bytes. Stored as `lq_lora` stores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from models.compression import lq_lora, training_method
from models.compression.base import Packed
from models.compression.formats import normal_float
from models.compression.training_method import TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")


class Config(TrainedConfig, normal_float.NormalFloatConfig):
    """Parameters of training adapters on a quantized base."""

    rank: int = Field(8, ge=1, le=4096, description="rank of the adapter, stored in bfloat16")
    init_from: Literal["lq", "zero"] = Field(
        "lq", description="base and adapter split in turns, or an adapter of nothing"
    )
    iterations: int = Field(100, ge=1, le=1000, description="most turns between low rank and rounding")

    @property
    def label(self) -> str:
        """For instance `nf3-r8`, `nf2-r8-zero`."""
        return f"nf{self.bits}-r{self.rank}" + ("-zero" if self.init_from == "zero" else "")


def begin(weight_OI: Tensor, config: Config) -> lq_lora.AdaptedPacked:
    """Return base and adapter to begin with; a function of the weight alone."""
    fields = lq_lora.Config.model_fields.keys() & type(config).model_fields.keys()
    split = lq_lora.Config(weighting="none", **{name: getattr(config, name) for name in fields})
    if config.init_from == "lq":
        return lq_lora.decompose(weight_OI.float(), torch.ones_like(weight_OI, dtype=torch.float32), split)
    rows, columns = weight_OI.shape
    rank = min(config.rank, rows, columns)
    generator = torch.Generator().manual_seed(rows * columns + rank)
    right_RI = torch.randn(rank, columns, generator=generator).to(weight_OI.device) * columns**-0.5
    left_OR = torch.zeros(rows, rank, dtype=torch.bfloat16, device=weight_OI.device)
    return lq_lora.AdaptedPacked(normal_float.quantize(weight_OI, split), left_OR, right_RI.to(torch.bfloat16))


class Method(TrainingMethod[Config], config=Config):
    """Training of adapters on a quantized base."""

    bits: ClassVar[str] = "2, 3, 4, 8 and an adapter"
    paper: ClassVar[str] = "Guo et al. 2023, LQ-LoRA (arXiv 2311.12023); Dettmers et al. 2023, QLoRA (arXiv 2305.14314)"

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Split the named layers; freeze all else."""
        from models.compression.modules import adapted

        linear = training_method.linear_layers(model, names)
        starts = {name: begin(module.weight.detach(), config) for name, module in linear.items()}
        training_method.put_layers(
            model, {name: adapted.AdaptedLinear(linear[name], start) for name, start in starts.items()}
        )
        adapted.freeze(model)

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:  # noqa: ARG002
        """Return the layers as stored."""
        from models.compression.modules import adapted

        adapted.thaw(model)
        return {
            name: module.pack() for name, module in model.named_modules() if isinstance(module, adapted.AdaptedLinear)
        }

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        quantized = normal_float.restore(tensors, config)
        return lq_lora.AdaptedPacked(quantized, tensors["adapter_left"], tensors["adapter_right"])

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return no training, the other start with equal steps and bytes (QLoRA), and equal steps in full precision."""
        baselines: dict[str, dict[str, Any]] = {
            "untrained": config.changed("lq_lora_tune", steps=0),
            "continued fp32": config.full_precision(),
        }
        return baselines | (
            {"qlora": config.changed("lq_lora_tune", init_from="zero")} if config.init_from == "lq" else {}
        )
