"""What a model is made of: blocks, their matrices, tied parameters, norms, head and cache, whatever its family.

Nothing here knows a family by name. Parts are found by the types of modules and by what transformers' configurations
have in common, and one forward pass on the meta device, which computes no number, shows that they are what they seem:
every block is called once and in order, gives back the shape that it was given, and calls each of its matrices.

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init

_IDS = (1, 8)
"""Sequences and tokens of the forward pass."""
_NORMS = ("Norm", "NormWeight")
"""How classes of normalisations end."""


@dataclass(frozen=True)
class Description:
    """The parts of one model, by the names of modules and parameters."""

    stack: str
    """The list of blocks."""
    depth: int
    """Number of blocks."""
    matrices: tuple[str, ...]
    """The linear layers inside the blocks, in the order of the model."""
    transposed: frozenset[str]
    """Those that transformers stores as [inputs, outputs], as GPT-2's."""
    tied: tuple[tuple[str, ...], ...]
    """Sets of parameters that are one tensor."""
    norms: tuple[str, ...]
    """Normalisations, inside of blocks and outside."""
    head: str | None
    """The output matrix over the vocabulary; None for a model without any."""
    cache: Literal["keys and values", "none"]
    """What the model keeps of tokens that it has seen."""
    in_tuples: bool
    """Whether a block gives back a tuple, with the hidden states in front."""
    positions: int | None
    """Longest sequence that learned positions allow, in tokens; None where positions are computed."""


def of_config(config: Mapping[str, Any]) -> Description:
    """Return the description of the model that a `config.json` names.

    Raises:
        ConfigError: what does not fit, by name.
    """
    return of_model(meta_init.build_config(config))


def of_folder(folder: Path) -> Description:
    """Return the description of the model in a folder; its weights are not read.

    Raises:
        ConfigError: what does not fit, by name.
    """
    return of_model(meta_init.build(folder))


@torch.no_grad()
def of_model(model: transformers.PreTrainedModel) -> Description:
    """Return the description of a model, which is moved to the meta device: give one that was built for this.

    Raises:
        ConfigError: what does not fit, by name.
    """
    name = type(model).__name__
    transposed = frozenset(n for n, m in model.named_modules() if isinstance(m, meta_init.TransposedLinear))
    tied = _tied(model)
    stack, blocks = meta_init.blocks(model)
    matrices = tuple(n for n, m in blocks.named_modules(prefix=stack) if isinstance(m, nn.Linear))
    if not matrices:
        raise ConfigError(f"{name}: no linear layer was found in {stack}")
    seen = _watched(model.to("meta"), blocks)
    if seen.blocks != list(range(len(blocks))):
        raise ConfigError(f"{name}: the blocks of {stack} are not called one after the other, but as {seen.blocks[:8]}")
    if seen.changed:
        raise ConfigError(f"{name}: {stack}.{seen.changed[0]} gives back another shape than it is given")
    if idle := [matrix for matrix in matrices if matrix not in seen.modules]:
        raise ConfigError(
            f"{name}: {len(idle)} linear layers are not called by a forward pass, among them {idle[0]}; "
            "mixtures of experts and layers that share their work are not compressed"
        )
    return Description(
        stack=stack,
        depth=len(blocks),
        matrices=matrices,
        transposed=transposed,
        tied=tied,
        norms=tuple(n for n, m in model.named_modules() if type(m).__name__.endswith(_NORMS)),
        head=_head(model),
        cache="keys and values" if seen.cache else "none",
        in_tuples=seen.in_tuples,
        positions=_positions(model, seen.modules),
    )


class _Seen:
    """What one forward pass has shown."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.changed: list[int] = []
        self.modules: set[str] = set()
        self.in_tuples = self.cache = False


def _watched(model: transformers.PreTrainedModel, blocks: nn.ModuleList) -> _Seen:
    seen = _Seen()

    def behind(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = meta_init.bound(blocks[index], args, kwargs)[0]
            seen.blocks.append(index)
            seen.in_tuples |= isinstance(output, tuple)
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, Tensor) or first.shape != given.shape:
                seen.changed.append(index)

        return hook

    def called(name: str) -> Any:
        return lambda *_ignored: seen.modules.add(name)

    hooks = [block.register_forward_hook(behind(i), with_kwargs=True) for i, block in enumerate(blocks)]
    hooks += [
        module.register_forward_pre_hook(called(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    # Without a cache, or with a padding token, some families look at the values of ids, which have none here.
    model.config.use_cache, model.config.pad_token_id = True, None
    try:
        output = model(input_ids=torch.zeros(_IDS, dtype=torch.long, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{type(model).__name__}: a forward pass over tokens alone fails: {first}") from error
    finally:
        for hook in hooks:
            hook.remove()
    seen.cache = getattr(output, "past_key_values", None) is not None
    return seen


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(sorted(same)) for same in names.values() if len(same) > 1)


def _head(model: transformers.PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _positions(model: transformers.PreTrainedModel, called: set[str]) -> int | None:
    """Return the rows of the embedding that has as many as the configuration has positions, and holds no tokens."""
    most = getattr(model.config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for name in called:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == most:
            # Positions of models with a padding row begin behind it, as RoBERTa's.
            return most if module.padding_idx is None else most - module.padding_idx - 1
    return None
