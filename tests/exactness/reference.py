"""The slow, obvious side of the exactness tests: a small model, its data, and optimizers written tensor by tensor.

Imports nothing of Ingot's optimizers, so that the two sides share no mistake. The worker (many ranks, DeepSpeed) and
the tests (one process) both read this file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS, LENGTH, SEQUENCES = 29, 18, 2, 31, 3, 5, 48
KEY_BIAS = "key.bias"
"""Softmax does not change when one number is added to all scores, so the gradient of a key bias is exactly zero and the
direction of its update is rounding noise; it has no influence on any output either."""


class Attention(nn.Module):
    """Causal self-attention with biases on every projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, _ = x_BLD.shape
        q, k, v = (
            projection(x_BLD).view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        mask = torch.ones(length, length, dtype=torch.bool, device=x_BLD.device).tril()
        attended = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))


class Layer(nn.Module):
    """A pre-norm Transformer block; sizes are not divisible by 2, 3 or 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD))
        return x_BLD + self.down(functional.gelu(self.up(self.norm2(x_BLD))))


class Temperature(nn.Module):
    """Scales the logits; its tensor of one element is smaller than any world, and has two axes, so it is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 1), 1.3))

    def forward(self, logits_BLV: Tensor) -> Tensor:
        return logits_BLV * self.scale


class Model(nn.Module):
    """A decoder; `tied` makes the head share the embedding."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.temperature = Temperature()
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.embedding(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return self.temperature(self.head(self.norm(x_BLD)))


def build(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Model:
    """Return the model, equal on every call and rank."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(7)
    model = Model(tied=tied)
    torch.random.set_rng_state(generator_state)
    return model.to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [SEQUENCES, LENGTH] of a step, with unequal numbers of tokens (-100 = none)."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (SEQUENCES,), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.arange(LENGTH)[None, :] >= lengths[:, None]] = -100
    return tokens[:, :-1], targets


def loss_sum(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy over real tokens."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def rate(case: Mapping[str, Any], step: int) -> float:
    """Return the learning rate of a step: three steps of warm-up, then a slow decay."""
    return float(case["lr"]) * min(1.0, (step + 1) / 3) * (1 - step / 100)


def plain_run(case: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Train in one process, tensor by tensor; returns weights, last trust ratios and states."""
    model = build(tied=case.get("tied", False), dtype=dtype)
    state: dict[str, dict[str, Any]] = {}
    ratios: dict[str, float] = {}
    for step in range(case["steps"]):
        active = set(case["active"][step // case["interval"]]) if "active" in case else None
        named = {name: p for name, p in model.named_parameters() if active is None or name in active}
        for name in [name for name in state if name not in named]:
            del state[name]
        if step == case.get("nan_step"):
            continue
        gradients = _gradients(model, named, step, case)
        ratios = {}
        for name, parameter in named.items():
            hyper = hyperparameters(case, name, tuple(parameter.shape), rate(case, step))
            update = UPDATES[case["optimizer"]]
            ratio = update(parameter.data, gradients[name], state.setdefault(name, {"t": 0}), hyper)
            if hyper["adapt"] and ratio is not None:
                ratios[name] = ratio
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"weights": weights, "ratios": ratios, "state": state}


def _gradients(model: nn.Module, named: Mapping[str, Tensor], step: int, case: Mapping[str, Any]) -> dict[str, Tensor]:
    inputs, targets = batch(step)
    computing = copy.deepcopy(model).bfloat16() if case.get("bf16") else model
    parameters = dict(computing.named_parameters())
    loss = loss_sum(computing, inputs, targets) / (targets != -100).sum()
    found = torch.autograd.grad(loss, [parameters[name] for name in named])
    gradients = {name: gradient.to(named[name].dtype) for name, gradient in zip(named, found, strict=True)}
    if case.get("clip"):
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        factor = min(1.0, case["clip"] / (norm + 1e-6))
        gradients = {name: gradient * factor for name, gradient in gradients.items()}
    return gradients


def hyperparameters(case: Mapping[str, Any], name: str, shape: tuple[int, ...], lr: float) -> dict[str, Any]:
    """Return the settings of one tensor: vectors are neither decayed nor adapted."""
    decay = case["weight_decay"]
    if case.get("groups") and name.startswith("layers.1"):
        decay, lr = decay * 3, lr * 0.5
    vector = len(shape) < 2
    return {"lr": lr, "decay": 0.0 if vector else decay, "adapt": not vector}


def lamb(x: Tensor, g: Tensor, state: dict[str, Any], hyper: Mapping[str, Any]) -> float:
    """Update x in place by the paper's algorithm 2; returns the trust ratio."""
    state["t"] += 1
    m = state["m"] = 0.9 * state.get("m", torch.zeros_like(x)) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", torch.zeros_like(x)) + 0.001 * g * g
    r = (m / (1 - 0.9 ** state["t"])) / ((v / (1 - 0.999 ** state["t"])).sqrt() + 1e-6)
    u = r + hyper["decay"] * x
    ratio = float(x.double().norm() / u.double().norm()) if hyper["adapt"] else 1.0
    x.sub_(hyper["lr"] * ratio * u)
    return ratio


def lars(x: Tensor, g: Tensor, state: dict[str, Any], hyper: Mapping[str, Any]) -> float:
    """Update x in place by algorithm 1 of LAMB's paper; returns the trust ratio."""
    m = state["m"] = 0.9 * state.get("m", torch.zeros_like(x)) + 0.1 * (g + hyper["decay"] * x)
    ratio = float(x.double().norm() / m.double().norm()) if hyper["adapt"] else 1.0
    x.sub_(hyper["lr"] * ratio * m)
    return ratio


def adamw(x: Tensor, g: Tensor, state: dict[str, Any], hyper: Mapping[str, Any]) -> None:
    """Update x in place by AdamW."""
    state["t"] += 1
    m = state["m"] = 0.9 * state.get("m", torch.zeros_like(x)) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", torch.zeros_like(x)) + 0.001 * g * g
    x.mul_(1 - hyper["lr"] * hyper["decay"])
    x.sub_(hyper["lr"] * (m / (1 - 0.9 ** state["t"])) / ((v / (1 - 0.999 ** state["t"])).sqrt() + 1e-6))


UPDATES = {"lamb": lamb, "lars": lars, "adamw": adamw}


class NaiveLamb(torch.optim.Optimizer):
    """LAMB as usually written, one trust ratio for each tensor it is given: what must not be handed to ZeRO."""

    def __init__(self, params: Iterator[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                hyper = {"lr": group["lr"], "decay": group["weight_decay"], "adapt": True}
                state = self.state[parameter]
                state.setdefault("t", 0)
                lamb(parameter.data, parameter.grad, state, hyper)
