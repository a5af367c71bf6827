"""One rank of the multi-rank tests: trains each case through DeepSpeed and writes what it saw.

Run as `worker.py CASES.json OUT` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; many cases share a launch,
because importing DeepSpeed takes longer than training them. Writes OUT/<case>/rank<r>.safetensors
(`master/<name>@<start>` for each fragment, `live/<name>` for whole live weights) and rank<r>.json.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import reference
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from models.optim import lisa
from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.training.zero_binding import attach, skip_shared_memory_build

Case = dict[str, Any]


def main() -> None:
    """Run all cases of the file."""
    torch.set_num_threads(1)
    skip_shared_memory_build()
    deepspeed.init_distributed("gloo", verbose=False)
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases:
        run(case, Path(sys.argv[2]) / case["id"])
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, out: Path) -> None:
    """Train one case and write its results; an error is a result too."""
    rank = dist.get_rank()
    facts: dict[str, Any] = {"rank": rank}
    model = reference.build(tied=case.get("tied", False))
    engine = created(case, model)
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, FragmentOptimizer):
        attach(engine)
    train(case, engine, optimizer, facts)
    tensors = {f"live/{name}": tensor for name, tensor in live(engine).items()}
    if isinstance(optimizer, FragmentOptimizer):
        facts["ratios"] = optimizer.trust_ratios()
        facts["counters"] = optimizer.counters()
        tensors |= {f"master/{f.name}@{f.start}": f.master.clone() for f in optimizer.fragments}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / f"rank{rank}.safetensors")
    (out / f"rank{rank}.json").write_text(json.dumps(facts))
    engine.destroy()


def created(case: Case, model: nn.Module) -> Any:
    """Return the DeepSpeed engine of a case."""
    world, accumulation = dist.get_world_size(), case.get("accumulation", 1)
    zero: dict[str, Any] = {"stage": case["stage"], **case.get("zero", {})}
    if case.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": reference.SEQUENCES // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.get("bf16", False)},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": case["clip"] if case.get("clip_by") == "engine" else 0.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(case, model), config=config)
    return engine


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a case."""
    if case["optimizer"] == "naive":
        return reference.NaiveLamb(model.parameters(), case["lr"], case["weight_decay"])
    module = importlib.import_module(f"models.optim.{case['optimizer']}")
    kind = {"lamb": "Lamb", "lars": "Lars", "adamw": "AdamW"}[case["optimizer"]]
    options = {"lr": case["lr"], "weight_decay": case["weight_decay"], **case.get("options", {})}
    if case["optimizer"] == "adamw":
        options["eps"] = 1e-6
    if case.get("clip") and case.get("clip_by") != "engine":
        options["max_grad_norm"] = case["clip"]
    return getattr(module, kind)(groups_of(case, model), **options)


def groups_of(case: Case, model: nn.Module) -> list[Any]:
    """Return the parameters, in one group or in several."""
    groups: list[Any] = list(model.named_parameters())
    if case.get("groups"):
        special = [pair for pair in groups if pair[0].startswith("layers.1")]
        rest = [pair for pair in groups if not pair[0].startswith("layers.1")]
        groups = [{"params": rest}, {"params": special, "weight_decay": case["weight_decay"] * 3, "share": 0.5}]
    return lisa.layer_groups(groups) if case.get("layer_groups") else groups


def train(case: Case, engine: Any, optimizer: Any, facts: dict[str, Any]) -> None:
    """Train, and record what must hold on the way."""
    names = [name for name, _ in engine.module.named_parameters()]
    facts.update(moved=[], skipped=[], grad_norms=[], state_bytes=[], active_bytes=[], active=[])
    start: dict[str, bytes] = {}
    active_bytes = 0
    for step in range(case["steps"]):
        if "lisa" in case and step % case["interval"] == 0:
            facts["moved"] += [changed(optimizer, start)] if start else []
            layers = lisa.draw(case["lisa"]["seed"], step // case["interval"], reference.LAYERS, case["lisa"]["layers"])
            active = lisa.active_names(names, layers)
            lisa.set_requires_grad(engine.module, active)
            optimizer.set_active(active)
            facts["active"].append(active)
            start = bytes_of(optimizer)
            active_bytes = sum(
                4 * len(optimizer.moment_names) * f.numel for f in optimizer.fragments if f.name in active
            )
        for group in optimizer.param_groups:
            group["lr"] = reference.rate(case, step) * group.get("share", 1.0)
        before = whole_state(optimizer) if step == case.get("nan_step") else None
        micro_batches(case, engine, step)
        if before is not None:
            facts["changed_by_nan"] = [key for key, value in whole_state(optimizer).items() if before.get(key) != value]
        if isinstance(optimizer, FragmentOptimizer):
            facts["skipped"].append(optimizer.last_step.skipped)
            facts["grad_norms"].append(optimizer.last_step.grad_norm)
            facts["state_bytes"].append(optimizer.state_bytes())
            facts["active_bytes"].append(active_bytes)
    facts["moved"] += [changed(optimizer, start)] if start else []


def micro_batches(case: Case, engine: Any, step: int) -> None:
    """Feed this rank's share of a step's sequences, normalised by all tokens of the step."""
    inputs, targets = reference.batch(step)
    world, rank, accumulation = dist.get_world_size(), dist.get_rank(), case.get("accumulation", 1)
    tokens = (targets != -100).sum()
    share = reference.SEQUENCES // world
    mine = slice(rank * share, (rank + 1) * share)
    for x, y in zip(inputs[mine].chunk(accumulation), targets[mine].chunk(accumulation), strict=True):
        # DeepSpeed averages over ranks and micro-batches; these factors turn that into a sum.
        loss = reference.loss_sum(engine, x, y) / tokens * world * accumulation
        if step == case.get("nan_step") and rank == case["nan_rank"]:
            loss = loss * float("nan")
        engine.backward(loss * case.get("loss_scale", 1.0))
        engine.step()


def bytes_of(optimizer: FragmentOptimizer) -> dict[str, bytes]:
    """Return the master bytes of this rank's fragments."""
    return {f.name: f.master.numpy().tobytes() for f in optimizer.fragments}


def changed(optimizer: FragmentOptimizer, before: dict[str, bytes]) -> list[str]:
    """Return the tensors whose bytes are no longer what they were."""
    now = bytes_of(optimizer)
    return [name for name, value in before.items() if now[name] != value]


def whole_state(optimizer: FragmentOptimizer) -> dict[str, bytes]:
    """Return all bytes that a skipped step must leave: masters, moments, step counts."""
    state = {f"master/{f.name}": f.master.numpy().tobytes() for f in optimizer.fragments}
    for fragment in optimizer.fragments:
        for key, tensor in optimizer.fragment_state(fragment).items():
            state[f"{key}/{fragment.name}"] = tensor.numpy().tobytes()
    return {**state, "counters": json.dumps(optimizer.counters()).encode()}


def live(engine: Any) -> dict[str, torch.Tensor]:
    """Return the whole live weights, gathered where ZeRO-3 has cut them up."""
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() < 3:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


if __name__ == "__main__":
    main()
