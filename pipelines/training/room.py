"""Whether the disk has room for a training's checkpoints, asked before the first step and not hours into it."""

from __future__ import annotations

from models.architectures.config import ArchitectureConfig, count_parameters
from pipelines.core import disk
from pipelines.training.config import PretrainConfig
from pipelines.training.worker_spec import WorkerSpec

_FLOAT = 4
MOMENTS = {"lamb": 2, "adamw": 2, "lars": 1}
"""Arrays that each optimizer keeps beside a weight."""


def active_parameters(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return the parameters that hold moments at a time: all of them, or with LISA the drawn layers' and the rest."""
    every = count_parameters(architecture)
    if not config.lisa.enabled:
        return every
    return every - (architecture.layers - config.lisa.layers) * layer_parameters(architecture)


def layer_parameters(architecture: ArchitectureConfig) -> int:
    """Return the parameters of one layer, not the first one."""
    deeper = architecture.model_copy(update={"layers": architecture.layers + 1})
    return count_parameters(deeper) - count_parameters(architecture)


def checkpoint_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return the size of a checkpoint: masters of all weights, and the moments of those that are active at a time."""
    moments = MOMENTS[config.optimizer.name] * active_parameters(config, architecture)
    return _FLOAT * (count_parameters(architecture) + moments)


def model_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return the size of the weights as they are stored, in 2 or 4 bytes each."""
    return count_parameters(architecture) * (_FLOAT if config.precision == "fp32" else 2)


def needed_bytes(config: PretrainConfig, architecture: ArchitectureConfig) -> int:
    """Return the bytes that a training holds at most: the kept checkpoints, the one being written, the model twice.

    The model is written to the scratch folder and then to the artifact.
    """
    kept = checkpoint_bytes(config, architecture) * (config.checkpoint.keep + 1)
    return kept + 2 * model_bytes(config, architecture)


def check(spec: WorkerSpec) -> None:
    """Refuse a training for whose checkpoints the disk has no room; what an earlier attempt has written counts as room.

    Raises:
        DiskFullError: with the bytes that are needed and free.
    """
    architecture = spec.config.architecture(spec.index)
    needed, one = needed_bytes(spec.config, architecture), checkpoint_bytes(spec.config, architecture)
    if needed > disk.free(spec.scratch) + disk.size_of(spec.scratch):
        kept = f"{spec.config.checkpoint.keep} are kept and one more is written, {one} bytes each"
        raise disk.full("the checkpoints and the model", spec.scratch, f"{kept}; {needed} bytes are needed in all")
