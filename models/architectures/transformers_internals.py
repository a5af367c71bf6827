"""All that is used of transformers beyond its documented interface, and what is assumed of it.

An assumption is checked where it is relied on; one that a newer transformers breaks is told with both versions, and not
by numbers that are silently wrong. `pyproject.toml` bounds the versions; a new bound starts with the tests of this
module and of `models/compression/modules/quantized_cache.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TESTED = "5.23"
"""The version that the assumptions were read from."""


def without_initialization() -> AbstractContextManager[None]:
    """Return a context in which transformers draws no weights for the models that are built."""
    return no_init_weights()


def attention_function(config: Any, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the attention that a configuration chose, as transformers' own layers look it up.

    Args:
        config: of the model.
        eager: the plain implementation of the family, for `eager`.

    Raises:
        NotImplementedError: the configuration no longer says.
    """
    if not isinstance(getattr(config, "_attn_implementation", None), str):
        raise _broken(f"{type(config).__name__} has no `_attn_implementation`")
    chosen: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)  # noqa: SLF001 - as transformers does
    return chosen


def become(
    module: nn.Module, subclass: type[nn.Module], parameters: Collection[str], overrides: Collection[str]
) -> None:
    """Turn a module into one of a subclass of its own class, in place: parameters, buffers and hooks stay.

    Args:
        module: an instance of exactly the class that `subclass` extends.
        subclass: adds methods, and nothing that `__init__` would have to make.
        parameters: attributes of the module that the subclass reads.
        overrides: methods of the base class that the subclass replaces.

    Raises:
        NotImplementedError: this transformers has no such attribute or method, or names a method's arguments otherwise.
    """
    base = type(module)
    if base not in subclass.__bases__ or subclass.__init__ is not base.__init__:
        raise TypeError(f"{subclass.__name__} does not extend {base.__name__} by methods alone")
    missing = [name for name in parameters if getattr(module, name, None) is None]
    if missing:
        raise _broken(f"{base.__name__} has no {', '.join(missing)}")
    for name in overrides:
        original = getattr(base, name, None)
        if original is None:
            raise _broken(f"{base.__name__} has no method {name}, so it would never be called")
        # `functools.wraps` says that a method takes whatever the original takes.
        taken = inspect.signature(vars(subclass)[name]).parameters.values()
        wanted = {p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD}
        if unknown := wanted - set(inspect.signature(original).parameters):
            raise _broken(f"{base.__name__}.{name} has no arguments {', '.join(sorted(unknown))}")
    module.__class__ = subclass


def module_names(model: PreTrainedModel) -> Callable[[str], str | None]:
    """Return how transformers renames a stored tensor while loading it: to the name that the model has for it.

    The function gives None for a tensor that is no parameter of its own there, as experts that are merged into one.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    places = model.state_dict()

    def renamed(stored: str) -> str | None:
        name, merged = rename_source_key(stored, renamings, converters, model.base_model_prefix, places)
        return None if merged is not None else str(name)

    return renamed


def _broken(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"transformers {transformers.__version__}: {what}; this code was written for {TESTED}. "
        "Install a version within the bounds of pyproject.toml"
    )
