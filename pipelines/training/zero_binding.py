"""Binds the optimizers of `models.optim` to a DeepSpeed engine: the only module that reads DeepSpeed's private layout.

ZeRO hands an optimizer flat slices in which the tensors are not visible, so a per-tensor method such as LAMB silently
becomes another algorithm. `attach` finds the tensors in the slices, checks every address against the live weights on
every rank, and refuses what it cannot serve. From a plain DeepSpeed script, with no other part of Ingot:

    optimizer = Lamb(model.named_parameters(), lr=2e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
        ..., "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True})
    attach(engine)

and with optimizer offload, `"zero_force_ds_cpu_optimizer": False`. With LISA under ZeRO 1 or 2, give the optimizer
`lisa.layer_groups(model.named_parameters())`: in one group, a single rank may hold all the moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.optim.fragment_layout import Fragment, Layout, whole_tensors
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core.errors import ConfigError

# Fragments, and beside each the live weights that it must equal.
Found = list[tuple[Fragment, Tensor]]


def attach(engine: Any) -> None:
    """Bind the engine's optimizer to the tensors that ZeRO has cut up. Call it on every rank, before the first step.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` of ZeRO stage 0-3, made with an optimizer of `models.optim`.

    Raises:
        ConfigError: if the engine uses something that the optimizer could not serve exactly, with the reason.
    """
    layout, elements = _agreed(engine, lambda: _located(engine))
    _verify(layout, elements)
    engine.basic_optimizer.bind(layout)


def _located(engine: Any) -> tuple[Layout, Tensor]:
    """Find the tensors, by this rank's knowledge alone."""
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    if not isinstance(optimizer, FragmentOptimizer):
        raise ConfigError(
            f"the engine's optimizer is {type(optimizer).__name__}",
            hint="pass Lamb, Lars or AdamW of models.optim to deepspeed.initialize(optimizer=...)",
        )
    _refuse_unserved(engine, optimizer)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if wrapper is optimizer:
        _name_groups(optimizer, names)
        layout = whole_tensors(optimizer.param_groups)
        return _counted(layout, [(fragment, fragment.master) for fragment in layout.fragments])
    read = _READERS.get(type(wrapper).__name__)
    if read is None:
        raise ConfigError(
            f"{type(wrapper).__name__} is a DeepSpeed optimizer whose layout is not known here",
            hint="use ZeRO stage 1, 2 or 3 for half precision, and stages 0 to 3 for float32",
        )
    return _counted(*read(engine, names))


def skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory extension at the first CPU process group.

    That takes minutes, and a build that was killed leaves a lock on which every later run waits for ever. Call it
    before `init_distributed`.

    Raises:
        ConfigError: this DeepSpeed lists its extensions in another way.
    """
    import deepspeed

    try:
        operators = deepspeed.ops.__compatible_ops__
        operators["deepspeed_shm_comm"]  # the name is checked: setting an unknown one would do nothing
        operators["deepspeed_shm_comm"] = False
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} lists its extensions in an unknown way: {error!r}",
            hint="install the version of deepspeed that flows/constraints.txt names",
        ) from error


def refresh_weights(engine: Any) -> None:
    """Push the fp32 masters to the live weights, after masters were loaded. Call it on every rank."""
    zero = engine.optimizer
    if isinstance(zero, FragmentOptimizer):
        return
    with torch.no_grad():
        if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3":
            zero.update_lp_params()
            return
        zero._partition_all_parameters()  # noqa: SLF001
        _push_stage_3(zero, range(len(zero.fp16_groups)))
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


# ---- what cannot be served ----------------------------------------------------------------------------------------


def _refuse_unserved(engine: Any, optimizer: FragmentOptimizer) -> None:
    zero = engine.optimizer
    reasons = {
        "round_robin_gradients reorders the flat buffers but not their addresses": engine.zero_round_robin_gradients(),
        "pipeline parallelism spreads layers over ranks": engine.pipeline_parallelism,
        "mixture-of-experts layers are reduced over other process groups": engine.has_moe_layers,
        "tensor parallelism splits tensors over ranks that norms are not summed over": (
            engine.mp_world_size > 1 or engine.autotp_size() > 1
        ),
        "sequence parallelism uses other process groups": engine.sequence_parallel_size > 1,
        "masters in half precision round small updates away": (
            getattr(zero, "master_weights_and_grads_dtype", torch.float32) != torch.float32
        ),
        "ZenFlow steps parts of tensors at other times": bool(getattr(zero, "zenflow", False)),
        "optimizer states on NVMe cannot be addressed": bool(getattr(zero, "swap_optimizer", False)),
        "float16 autocast scales gradients behind the optimizer's back": (
            getattr(zero, "torch_autocast_gradscaler", None) is not None
        ),
        "gradients are clipped both by the engine (gradient_clipping) and by the optimizer (max_grad_norm)": (
            engine.gradient_clipping() > 0 and optimizer.max_grad_norm is not None
        ),
    }
    for reason, present in reasons.items():
        if present:
            raise ConfigError(f"{type(optimizer).__name__} cannot be exact here: {reason}", hint="turn it off")


def _name_groups(optimizer: FragmentOptimizer, names: dict[int, str]) -> None:
    for number, group in enumerate(optimizer.param_groups):
        group["param_names"] = [
            names.get(id(parameter), f"group{number}.param{index}") for index, parameter in enumerate(group["params"])
        ]


# ---- where DeepSpeed keeps the fragments ----------------------------------------------------------------------------


def _stage_1_and_2(engine: Any, names: dict[int, str]) -> tuple[Layout, Found]:
    zero = engine.optimizer
    layout, found = _mapped(zero, zero.bit16_groups, zero.single_partition_of_fp32_groups, names, engine.device)

    def copy_to_weights(partitions: Sequence[Tensor]) -> None:
        for slices, partition, group in zip(
            zero.parallel_partitioned_bit16_groups,
            zero.single_partition_of_fp32_groups,
            zero.real_dp_process_group,
            strict=True,
        ):
            if any(partition is one for one in partitions):
                slices[dist.get_rank(group)].data.copy_(partition.data)

    return _completed(layout, copy_to_weights=copy_to_weights, skipped=lambda: bool(zero.overflow)), found


def _bf16(engine: Any, names: dict[int, str]) -> tuple[Layout, Found]:
    zero = engine.optimizer
    layout, found = _mapped(zero, zero.bf16_groups, zero.fp32_groups_flat_partition, names, engine.device)
    return _completed(layout, copy_to_weights=None, skipped=lambda: bool(zero.overflow)), found


def _mapped(
    zero: Any, groups: list[list[Tensor]], partitions: list[Tensor], names: dict[int, str], device: torch.device
) -> tuple[Layout, Found]:
    """Read the addresses that ZeRO 1 and 2 keep on each parameter, for groups and their fp32 partitions."""
    found: Found = []
    shapes, partition_of = {}, {}
    for parameters, partition in zip(groups, partitions, strict=True):
        for parameter in parameters:
            name = names[id(parameter)]
            shapes[name], partition_of[name] = tuple(parameter.shape), partition
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # noqa: SLF001
            if mapping is None:
                continue
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragment = Fragment(name, shapes[name], low.start, high.numel, partition, high.start)
            found.append((fragment, parameter.detach().reshape(-1).narrow(0, low.start, low.numel)))
    reduce = _reducer(zero.real_dp_process_group[0], device)
    return Layout(tuple(fragment for fragment, _ in found), shapes, partition_of, reduce), found


def _stage_3(engine: Any, names: dict[int, str]) -> tuple[Layout, Found]:
    zero = engine.optimizer
    sources = [group["_ds_source_param_group_id"] for group in zero.trainable_param_groups]
    if sources != list(range(len(zero.optimizer.param_groups))):
        raise ConfigError(
            f"ZeRO-3 made groups {sources} of {len(zero.optimizer.param_groups)} parameter groups",
            hint="every parameter group needs a trainable parameter when the engine is created",
        )
    found: Found = []
    shapes, partition_of = {}, {}
    rank = dist.get_rank(zero.dp_process_group)
    for parameters, partition in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in parameters:
            name = names[id(parameter)]
            shapes[name], partition_of[name] = tuple(parameter.ds_shape), partition
            _, offset, room = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * room
            # The last partitions of a tensor end in padding that DeepSpeed leaves uninitialised.
            numel = max(0, min(room, parameter.ds_numel - start))
            if numel:
                fragment = Fragment(name, shapes[name], start, numel, partition, offset)
                found.append((fragment, parameter.ds_tensor.detach().reshape(-1).narrow(0, 0, numel)))

    def copy_to_weights(partitions: Sequence[Tensor]) -> None:
        late = [
            number
            for number, partition in enumerate(zero.fp32_partitioned_groups_flat)
            if any(partition is one for one in partitions)
        ]
        _push_stage_3(zero, late)

    reduce = _reducer(zero.dp_process_group, engine.device)
    layout = Layout(tuple(fragment for fragment, _ in found), shapes, partition_of, reduce)
    return _completed(layout, copy_to_weights=copy_to_weights, skipped=lambda: bool(zero.overflow)), found


_READERS: dict[str, Callable[[Any, dict[int, str]], tuple[Layout, Found]]] = {
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}


def _completed(
    layout: Layout, copy_to_weights: Callable[[Sequence[Tensor]], None] | None, skipped: Callable[[], bool]
) -> Layout:
    return Layout(layout.fragments, layout.shapes, layout.partition_of, layout.reduce, copy_to_weights, skipped)


def _push_stage_3(zero: Any, sub_groups: Sequence[int]) -> None:
    for number in sub_groups:
        zero._reassign_or_swap_out_partitioned_parameters(number)  # noqa: SLF001


def _reducer(group: Any, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return the function that sums a tensor over a process group, on the device that its backend needs."""
    if dist.get_world_size(group) == 1:
        return None

    def reduce(sums: Tensor) -> Tensor:
        moved = sums.to(device)
        dist.all_reduce(moved, group=group)
        return moved

    return reduce


def _agreed(engine: Any, read: Callable[[], tuple[Layout, Tensor]]) -> tuple[Layout, Tensor]:
    """Read on every rank, and refuse on all ranks when one could not: a rank alone would leave the others waiting."""
    problem: ConfigError | None = None
    result = None
    try:
        result = read()
    except ConfigError as error:
        problem = error
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        problem = ConfigError(
            f"this DeepSpeed lays out {type(engine.optimizer).__name__} in an unknown way: {error!r}",
            hint="install the version of deepspeed that flows/constraints.txt names",
        )
        problem.__cause__ = error
    failures = torch.tensor([float(result is None)], device=engine.device)
    dist.all_reduce(failures)
    if problem is not None:
        raise problem
    if result is None or failures.item():
        raise ConfigError(
            f"{int(failures.item())} of {dist.get_world_size()} ranks cannot bind the optimizer",
            hint="their own messages say why",
        )
    return result


def _counted(layout: Layout, found: Found) -> tuple[Layout, Tensor]:
    """Return the elements of each tensor found on this rank, and how many fragments differ from the live weights."""
    index = {name: position for position, name in enumerate(layout.shapes)}
    elements = torch.zeros(2, len(index), dtype=torch.float64)
    for fragment, live in found:
        elements[0, index[fragment.name]] += fragment.numel
        same = live.numel() == fragment.numel and torch.equal(fragment.master.to(live), live)
        elements[1, index[fragment.name]] += not same
    return layout, elements


def _verify(layout: Layout, elements: Tensor) -> None:
    """Check on all ranks together that fragments hold the live weights, and that they cover every tensor once."""
    totals, wrong = (elements if layout.reduce is None else layout.reduce(elements)).tolist()
    for position, (name, shape) in enumerate(layout.shapes.items()):
        if wrong[position] or totals[position] != math.prod(shape):
            raise ConfigError(
                f"{name}: the fp32 master at DeepSpeed's address is not the live weight "
                f"({int(totals[position])} of {math.prod(shape)} elements found)",
                hint="this DeepSpeed version or option moves the flat buffers; attach before any other change to them",
            )
