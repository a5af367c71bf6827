"""What a probe is, and how it is found: a module of `pipelines/evaluation/probes` is one, under its own file name.

A probe looks at one loaded model and the held-out documents and says something of it that likelihoods and tasks do not.
It gives rows of two kinds, never mixed up: a *result* is the same bytes for the same inputs and stands in
evaluation.json; an *observation* (time, memory) stands in observations.json, and no fingerprint knows of it.

Nothing here imports torch or numpy, nor may a probe's module: `ingot plan` reads the settings of every probe in use.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field

from models.architectures.config import Family
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.settings import Settings
from pipelines.evaluation import probes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.measure.heldout import Heldout
    from pipelines.measure.scoring import Scorer


class ProbeSettings(Settings):
    """Settings of one probe."""

    enabled: bool = Field(default=True, description="Run this probe.")


@dataclass(frozen=True)
class Subject:
    """What a probe sees of the model under evaluation."""

    scorer: Scorer
    folder: Path
    """The model folder."""
    documents: Heldout
    window: int
    """Tokens that the model is shown at once."""
    bootstrap: Mapping[str, Any]
    """`samples`, `seed` and `confidence` of the intervals of this evaluation."""
    base: Artifact | None = None
    """Evaluation of the base model, where this one is a variant."""

    def base_array(self, probe: str) -> NDArray[np.float64] | None:
        """Return the array that a probe has kept of the base model; None where there is no base model, or no array."""
        import numpy as np

        if self.base is None or f"{probe}.npy" not in self.base.manifest.files:
            return None
        array: NDArray[np.float64] = np.load(self.base.path / f"{probe}.npy", allow_pickle=False)
        return array


@dataclass(frozen=True)
class Measurement:
    """What a probe found, as JSON values under its own name."""

    result: Mapping[str, Any] = field(default_factory=dict)
    """Stands in evaluation.json under `probes`."""
    versus_base: Mapping[str, Any] = field(default_factory=dict)
    """A variant beside its base model; stands in evaluation.json under `versus_base`."""
    observation: Mapping[str, Any] = field(default_factory=dict)
    """Stands in observations.json."""
    array: NDArray[np.float64] | None = None
    """Kept as NAME.npy, a part of the result: what later evaluations are compared with."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """Kept as NAME.json, a part of the result: what people read."""


S = TypeVar("S", bound=ProbeSettings)


class Probe(ABC, Generic[S]):
    """One probe; a module of `probes` defines exactly one subclass."""

    families: ClassVar[frozenset[Family]]
    """Which models it measures."""
    observes: ClassVar[bool] = False
    """Whether all that it gives is observation: then its settings are no part of an evaluation's identity."""
    Settings: type[S]

    @property
    def name(self) -> str:
        """The name of its module."""
        return type(self).__module__.rpartition(".")[2]

    def refusal(self, subject: Subject) -> str | None:
        """Return why this model cannot be measured; None where it can."""
        if subject.scorer.family not in self.families:
            wanted = " and ".join(sorted(self.families))
            return f"it measures {wanted} models; the family of this one is {subject.scorer.family}"
        return None

    def misfit(self, settings: S, family: Family) -> str | None:  # noqa: ARG002 - most settings fit all families
        """Return which setting does nothing or cannot work for the models of a run; None where all fit."""
        return None

    def measure(self, subject: Subject, settings: S) -> Measurement:
        """Measure a model.

        Raises:
            ConfigError: it cannot be measured; names the probe and the reason.
        """
        if reason := self.refusal(subject):
            raise ConfigError(f"the probe {self.name!r} does not measure {subject.scorer.name}: {reason}")
        return self._measure(subject, settings)

    @abstractmethod
    def _measure(self, subject: Subject, settings: S) -> Measurement:
        """Measure a model that is not refused."""


# ---- registry ---------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Return the names of all probes, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(probes.__path__))


@functools.cache
def get(name: str) -> Probe[Any]:
    """Return a probe by name.

    Raises:
        ValueError: no probe has this name; the message lists the known ones and the nearest.
        TypeError: its module does not define exactly one `Probe`.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no probe {name!r}{meant} (known: {', '.join(names())})")
    module = importlib.import_module(f"{probes.__name__}.{name}")
    # Not `isinstance(member, type)`: asking a module that is loaded when first used for its class would load it.
    classes = [member for member in vars(module).values() if issubclass(type(member), type)]
    defined = [c for c in classes if issubclass(c, Probe) and c.__module__ == module.__name__]
    if len(defined) != 1:
        raise TypeError(f"{module.__name__} defines {len(defined)} probes; a module is one probe")
    probe: Probe[Any] = defined[0]()
    return probe
