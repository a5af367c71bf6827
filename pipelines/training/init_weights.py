"""Training that does not begin at random weights: is the model to start from the one that is about to train?

A model of the same shapes may still compute something else: another rotary base, another token behind an id. Training
would repair neither; both are refused, by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from models.architectures.config import ArchitectureConfig
from pipelines.core.artifact import read_json
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.modelio.meta_init import parameters_on_meta
from pipelines.training.tokens import refuse_other_tokens, some

Shapes = Mapping[str, tuple[int, ...]]

_FREE = {
    "_name_or_path", "architectures", "bos_token_id", "cls_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "pad_token_id", "sep_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of config.json that may differ: they say nothing about what the weights compute. Ids have their own check."""


def check(architecture: ArchitectureConfig, folder: Path, tokenizer: Path) -> None:
    """Refuse weights that do not fit what is about to be trained.

    Args:
        architecture: the model that the configuration describes.
        folder: model folder to start from.
        tokenizer: folder of the tokenizer that packed the corpus.

    Raises:
        ConfigError: naming the settings, tensors or tokens that differ.
    """
    family = importlib.import_module(f"models.architectures.{architecture.family}")
    refuse_other_settings(family.layout(architecture).to_dict(), _json(folder / "config.json"))
    with parameters_on_meta():
        model = family.construct(architecture)
    model.tie_weights()
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    refuse_other_shapes(wanted, stored_shapes(folder), also=model.state_dict().keys())
    refuse_other_tokens(folder, tokenizer)


def refuse_other_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a config.json that describes another computation; entries that it does not have count as ours.

    Raises:
        ConfigError: naming the entries.
    """
    differing = [
        f"{name} is {theirs[name]!r}, this run's is {ours[name]!r}"
        for name in sorted(ours.keys() & theirs.keys() - _FREE)
        if theirs[name] != ours[name]
    ]
    if differing:
        raise ConfigError(
            f"base.from: the model to start from is another model: {some(differing)}",
            hint="set pretrain.family, pretrain.preset and pretrain.model to the shape that its config.json shows",
        )


def refuse_other_shapes(wanted: Shapes, stored: Shapes, also: Any = ()) -> None:
    """Refuse weights of which one is missing, too many, or of another shape; names in `also` may be there too.

    Raises:
        ConfigError: naming the tensors.
    """
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} has no place here" for name in stored if name not in wanted and name not in also]
    problems += [
        f"{name} has the shape {list(stored[name])}, {list(shape)} is needed"
        for name, shape in wanted.items()
        if name in stored and tuple(stored[name]) != shape
    ]
    if problems:
        raise ConfigError(
            f"base.from: the weights do not fit the model: {some(problems)}",
            hint="set pretrain.preset and pretrain.model to the shape of the model to start from",
        )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored tensor, reading no weights."""
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in _tensors(folder)}


def load(model: nn.Module, folder: Path) -> None:
    """Overwrite the parameters of `model` with the stored ones, in the precision of the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, file in _tensors(folder):
            if name in parameters:
                parameters[name].copy_(file.get_tensor(name))


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                yield from ((name, file) for name in file.keys())  # noqa: SIM118 - the handle is no mapping
        except SafetensorError as error:
            raise IntegrityError(f"{path} is damaged: {error}", hint="`ingot verify` names damaged files") from error


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path)
    return found
