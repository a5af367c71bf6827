"""The names under which a model folder stores its tensors, and what the model's modules call them.

transformers loads a checkpoint of a bare model into one with a head, and the other way round, and old names of
normalisations; everything here reads tensor by tensor and wants one name. So tensors are renamed once, by `fetch`.
"""

from __future__ import annotations

from pathlib import Path

from models.architectures import transformers_internals
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader

_SHOWN = 3


def mapping(folder: Path) -> dict[str, str]:
    """Return stored name -> name in the model, for every stored tensor that the model has a place for.

    Raises:
        ConfigError: the folder lacks a parameter of the model; a config.json that no installed class can build.
        IntegrityError: the weights are damaged.
    """
    try:
        model = meta_init.build(folder)
    except (IntegrityError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be built: {error}") from error
    places, name_of = set(model.state_dict()), transformers_internals.module_names(model)
    names = {stored: stored if stored in places else name_of(stored) for stored in WeightReader(folder).names()}
    if merged := [stored for stored, name in names.items() if name is None]:
        raise ConfigError(f"{folder}: {merged[0]} is merged with other tensors by transformers, which is not done here")
    renamed = {stored: name for stored, name in names.items() if name is not None and name in places}
    present = set(renamed.values())
    wanted: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted.setdefault(id(parameter), []).append(name)
    if missing := [names[0] for names in wanted.values() if not present & set(names)]:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ConfigError(
            f"{folder} holds no weights for {', '.join(missing[:_SHOWN])}{more} of {type(model).__name__}",
            hint="config.json names another model than the one whose weights lie beside it: transformers would fill "
            "these with random numbers",
        )
    return renamed
