"""A model without its weights: parameters are loaded where they are needed and released afterwards."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from models.architectures.transformers_internals import without_initialization
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.modelio.folder import WeightReader


def build(folder: Path) -> transformers.PreTrainedModel:
    """Return the model of a folder with every parameter on the meta device and every buffer real.

    Raises:
        IntegrityError: the configuration names no architecture of the installed transformers.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with without_initialization(), parameters_on_meta():
        model = architecture(config, folder)(config)
    model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False)


def architecture(config: transformers.PretrainedConfig, folder: Path) -> type[transformers.PreTrainedModel]:
    """Return the transformers class that the configuration names."""
    names = config.architectures or ["(none)"]
    found: type[transformers.PreTrainedModel] | None = getattr(transformers, names[0], None)
    if found is None:
        raise IntegrityError(f"{folder / 'config.json'} names the architecture {names[0]!r}, which transformers lacks")
    return found


def is_encoder(model: transformers.PreTrainedModel) -> bool:
    """Return whether a model predicts masked tokens."""
    return type(model).__name__.endswith("ForMaskedLM")


def parameters_on_meta() -> AbstractContextManager[None]:
    """Return a context in which parameters are created on the meta device; buffers stay real and hold their values.

    Buffers such as the frequencies of rotary positions are computed while a model is built and stand in no file.
    """
    return init_empty_weights(include_buffers=False)


def blocks(model: transformers.PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the stack of transformer layers and its name.

    Raises:
        ConfigError: the model has no single stack of `num_hidden_layers` layers.
    """
    depth = getattr(model.config, "num_hidden_layers", 0)
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(stacks)} stacks of {depth} layers; compression walks models with one"
        )
    return stacks[0]


def load(module: nn.Module, prefix: str, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
    """Load the parameters below `module`, whose name in the model is `prefix`, in place."""
    for name, _ in list(module.named_parameters()):
        set_parameter(module, name, reader.dense(f"{prefix}.{name}" if prefix else name).to(device, dtype))


def load_rest(model: transformers.PreTrainedModel, stack: str, reader: WeightReader, device: torch.device) -> None:
    """Load every parameter outside the stack of layers; tied ones that the folder does not hold stay on meta."""
    stored = set(reader.names())
    for name, _ in list(model.named_parameters()):
        if name in stored and not name.startswith(f"{stack}."):
            set_parameter(model, name, reader.dense(name).to(device, model.dtype))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def release(module: nn.Module) -> None:
    """Drop the parameters below `module`."""
    for name, parameter in list(module.named_parameters()):
        set_parameter(module, name, parameter.to("meta"))


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
