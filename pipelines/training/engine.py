"""What turns a loss into an update: DeepSpeed through Accelerate, or plain PyTorch in one process.

Both engines train the same `LossModule` with one of our optimizers, so everything above them (loop, checkpoints,
metrics) is written once. DeepSpeed and Accelerate are imported only when they are used.

Traps that this file is built around (each was seen, see README "Design"):

* `Accelerator(cpu=True)` silently drops DeepSpeed for plain DDP, and without it a CPU rank believes that it is alone.
  Rank and world therefore come from the process group, and the engine that came back is checked.
* The first CPU process group compiles a shared-memory extension, and waits for ever on a stale lock of an earlier
  build. It is declared incompatible before it is looked for.
* DeepSpeed's own checkpoints unpickle what they load; they are never used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.optim.sharded_optimizer import FragmentOptimizer, StepRecord
from pipelines.core.errors import ConfigError
from pipelines.training.config import PretrainConfig
from pipelines.training.data_loader import Batch
from pipelines.training.distributed import Ranks, meet
from pipelines.training.loss_module import LossModule, Question
from pipelines.training.memory import LARGEST_BUCKET

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], FragmentOptimizer]

_BUCKET_ALIGNMENT = 128
"""Elements."""


class Engine(Protocol):
    """What the training loop needs of an engine."""

    module: LossModule
    """Model and loss with this rank's live parameters."""
    optimizer: FragmentOptimizer
    ranks: Ranks

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed nats of a micro batch."""
        ...

    def ask(self, question: Question, inputs_BT: Tensor) -> Tensor:
        """Return what a question gives, without gradients; every rank calls it, with inputs of one shape."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`, summed over ranks and micro batches; `last` ends the step's accumulation."""
        ...

    def step(self, lr: float) -> StepRecord:
        """Update the weights and clear the gradients."""
        ...

    def copy_to_weights(self) -> None:
        """Make the model compute with the optimizer's master weights, after these were loaded."""
        ...


class PlainEngine:
    """One process, no sharding: the reference that the DeepSpeed engine is tested against."""

    def __init__(self, module: LossModule, make: MakeOptimizer, *, device: torch.device, precision: str) -> None:
        self.module = module.to(device)
        self.optimizer = make(_named(module))
        self.ranks = Ranks(0, 1, device)
        self._autocast = precision == "bf16"

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed nats of a micro batch."""
        with torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            result: Tensor = self.module(batch.inputs_BT, batch.targets_BT)
        return result

    def ask(self, question: Question, inputs_BT: Tensor) -> Tensor:
        """Return what a question gives."""
        with torch.no_grad(), torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return question(self.module.model, inputs_BT)

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002 - nothing is reduced at the end
        """Add the gradients of `loss`."""
        loss.backward()

    def step(self, lr: float) -> StepRecord:
        """Update the weights and clear the gradients."""
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.optimizer.last_step

    def copy_to_weights(self) -> None:
        """Do nothing: the parameters are the master weights."""


class DeepSpeedEngine:
    """DeepSpeed with ZeRO stage 0 to 3, prepared by Accelerate, driven by our optimizer on its fragments."""

    def __init__(self, module: LossModule, make: MakeOptimizer, config: PretrainConfig, device: torch.device) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        from pipelines.training import zero_binding

        self._fragments = zero_binding
        self.optimizer = make(_named(module))
        self._engine = prepare(module, self.optimizer, config)
        self.module = self._engine.module
        self.ranks = Ranks.current(device)
        check(self._engine, self.ranks, config)
        zero_binding.attach(self._engine)

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed nats of a micro batch."""
        result: Tensor = self._engine(batch.inputs_BT, batch.targets_BT)
        return result

    def ask(self, question: Question, inputs_BT: Tensor) -> Tensor:
        """Return what a question gives, by a pass of the whole module: under ZeRO-3 that is what gathers weights."""
        with torch.no_grad(), self.module.asked(question):
            result: Tensor = self._engine(inputs_BT, inputs_BT)
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; DeepSpeed averages over ranks, so the sum needs a factor of the world size."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world, scale_wrt_gas=False)

    def step(self, lr: float) -> StepRecord:
        """Update the weights and clear the gradients."""
        set_lr(self.optimizer, lr)
        self._engine.step()
        return self.optimizer.last_step

    def copy_to_weights(self) -> None:
        """Copy the loaded master weights into the live (possibly half-precision, possibly sharded) weights."""
        self._fragments.refresh_weights(self._engine)


def create(config: PretrainConfig, module: LossModule, make: MakeOptimizer, device: torch.device) -> Engine:
    """Return the engine that the configuration asks for."""
    if config.engine == "plain":
        return PlainEngine(module, make, device=device, precision=config.precision)
    return DeepSpeedEngine(module, make, config, device)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed through Accelerate


def deepspeed_settings(config: PretrainConfig, parameters: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration; nothing in it is left for a library to fill in.

    Clipping is off because the optimizer clips, with the norm of the active tensors only. Buckets are buffers: larger
    than the model they would only waste memory. DeepSpeed wants them aligned.
    """
    bucket = min(LARGEST_BUCKET, -(-parameters // _BUCKET_ALIGNMENT) * _BUCKET_ALIGNMENT)
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "train_batch_size": config.batch_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": {"device": "cpu"}} if config.offload else {}),
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def prepare(module: LossModule, optimizer: FragmentOptimizer, config: PretrainConfig) -> Any:
    """Return the DeepSpeed engine that Accelerate made of the module and the optimizer."""
    import deepspeed
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    from pipelines.training.zero_binding import skip_shared_memory_build

    if os.environ.pop("ACCELERATE_USE_CPU", None):
        raise ConfigError("ACCELERATE_USE_CPU is set: Accelerate would drop DeepSpeed", hint="unset it and run again")
    skip_shared_memory_build()
    deepspeed.utils.logger.setLevel("WARNING")
    settings = deepspeed_settings(config, sum(p.numel() for p in module.parameters()))
    meet()
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        gradient_accumulation_steps=config.accumulation,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
    )
    prepared, _ = accelerator.prepare(module, optimizer)
    return prepared


def check(engine: Any, ranks: Ranks, config: PretrainConfig) -> None:
    """Refuse an engine that is not the one that was asked for.

    Raises:
        ConfigError: naming what disagrees.
    """
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise ConfigError(f"Accelerate prepared a {type(engine).__name__}, not a DeepSpeed engine")
    found = {
        "ranks in the process group": (ranks.world, config.world_size),
        "engine's data-parallel world": (engine.dp_world_size, config.world_size),
        "engine's ZeRO stage": (int(engine.zero_optimization_stage()), config.zero_stage),
        "engine's batch size": (engine.train_batch_size(), config.batch_size),
        "engine's accumulation": (engine.gradient_accumulation_steps(), config.accumulation),
    }
    for what, (is_, wanted) in found.items():
        if is_ != wanted:
            raise ConfigError(f"{what} is {is_}, the configuration says {wanted}")


def _named(module: LossModule) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())
