"""A model without its weights: parameters are loaded where they are needed and released afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.architectures.transformers_internals import without_initialization
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.modelio.folder import WeightReader


def build(folder: Path) -> transformers.PreTrainedModel:
    """Return the model of a folder with every parameter on the meta device and every buffer real.

    Raises:
        IntegrityError: the configuration names no architecture of the installed transformers.
    """
    return _built(transformers.AutoConfig.from_pretrained(folder), str(folder / "config.json"))


def build_config(values: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """Return the model that the content of a `config.json` describes, as `build` does.

    Raises:
        ConfigError: it names no model type of the installed transformers.
    """
    settings = {name: value for name, value in values.items() if name != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(str(values.get("model_type")), **settings)
    except ValueError:
        raise ConfigError(
            f"config.json names the model type {values.get('model_type')!r}, which transformers "
            f"{transformers.__version__} does not know; code that comes with a model is not run"
        ) from None
    return _built(config, "config.json")


def _built(config: transformers.PretrainedConfig, where: str) -> transformers.PreTrainedModel:
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with without_initialization(), parameters_on_meta():
        model = architecture(config, where)(config)
    linearize(model)
    model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False)


class TransposedLinear(nn.Linear):
    """A linear layer whose weight transformers stores as [inputs, outputs]; in memory it is [outputs, inputs]."""


def linearize(model: nn.Module) -> None:
    """Put a `TransposedLinear` in the place of every Conv1D of transformers, which is a linear layer by that name."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight_OI = module.weight.detach().T.contiguous()
            layer = TransposedLinear(weight_OI.shape[1], weight_OI.shape[0], device="meta")
            layer.weight = nn.Parameter(weight_OI, requires_grad=module.weight.requires_grad)
            layer.bias = module.bias
            model.set_submodule(name, layer)


def bound(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states among the arguments of a block, and all others by name: families pass them either way.

    Args:
        block: whose `forward` names the arguments; hidden states come first.
        args: by place.
        kwargs: by name.
    """
    signature = inspect.signature(type(block).forward)
    given = signature.bind(block, *args, **kwargs).arguments
    names = [name for name, one in signature.parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    extra = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), "")
    hidden = given[names[1]]
    others = {name: value for name, value in given.items() if name not in (*names[:2], extra)}
    return hidden, others | given.get(extra, {})


def architecture(config: transformers.PretrainedConfig, where: Path | str) -> type[transformers.PreTrainedModel]:
    """Return the transformers class that the configuration names; `where` it is written, for messages."""
    names = config.architectures or ["(none)"]
    found: type[transformers.PreTrainedModel] | None = getattr(transformers, names[0], None)
    if found is None:
        raise IntegrityError(f"{where} names the architecture {names[0]!r}, which transformers lacks")
    return found


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
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    # A list inside a block (of experts, of heads) may happen to be as long.
    stacks = [(n, m) for n, m in lists if not any(n.startswith(f"{outer}.") for outer, _ in lists)]
    if len(stacks) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(stacks)} stacks of {depth} layers; compression walks models with one"
        )
    return stacks[0]


def load(module: nn.Module, prefix: str, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
    """Load the parameters below `module`, whose name in the model is `prefix`, in place."""
    for name, _ in list(module.named_parameters()):
        stored = as_in_memory(module, name, reader.dense(f"{prefix}.{name}" if prefix else name))
        set_parameter(module, name, stored.to(device, dtype))


def load_rest(model: transformers.PreTrainedModel, stack: str, reader: WeightReader, device: torch.device) -> None:
    """Load what is still missing outside the stack of layers; tied parameters that the folder lacks stay on meta."""
    stored = set(reader.names())
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name in stored and not name.startswith(f"{stack}."):
            set_parameter(model, name, as_in_memory(model, name, reader.dense(name)).to(device, model.dtype))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def release(module: nn.Module) -> None:
    """Drop the parameters below `module`."""
    for name, parameter in list(module.named_parameters()):
        set_parameter(module, name, parameter.to("meta"))


def as_in_memory(module: nn.Module, name: str, stored: Tensor) -> Tensor:
    """Return a stored parameter as the module below `module` has it: a `TransposedLinear` turns its weight."""
    owner, _, leaf = name.rpartition(".")
    turned = leaf == "weight" and isinstance(module.get_submodule(owner), TransposedLinear)
    return stored.T.contiguous() if turned else stored


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
