"""Times int8 against float32 on the CPU, prefill and decode, in one run.

    OMP_NUM_THREADS=1 python tests/bench/bench_int8.py --width 1024 --layers 4 --json

Arms: a decoder in torch, float32 against the int8 loader (`pipelines.deploy.int8_inference`); the same in
llama.cpp, f32 against q8_0; an encoder in onnxruntime, fp32 against int8 (`--encoder`, whose export takes a while).
Weights are random, since
time does not depend on them. Arms take turns, so that a busy machine slows all alike, and a ratio is the median over
rounds of the ratio in the same round. On one thread the time is CPU time, so that waiting for a core does not count.
Ends with 1 when the int8 loader is not faster than float32 at both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.data import tokenizer
from pipelines.data.config import TokenizerTraining
from pipelines.deploy import gguf, int8_inference, onnx
from pipelines.modelio.load import load_model

CONTEXT = 512
Arm = tuple[Callable[[], object], Callable[[], object] | None]
"""Prefill, and decode after it (None: an encoder)."""


def write_model(folder: Path, options: argparse.Namespace, family: str) -> Artifact:
    """Publish a random model with a byte-level tokenizer."""
    trained = tokenizer.train(["abc"], 260, TokenizerTraining())
    config = ArchitectureConfig(
        family=family,
        width=options.width,
        layers=options.layers,
        heads=options.width // 64,
        ffn_width=options.width * 11 // 4,
        vocab_size=trained.vocab_size,
        max_positions=CONTEXT,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        mask_id=3,
    )
    build(config, seed=0).save_pretrained(folder / "build" / "model")
    trained.save(folder / "build" / "model", CONTEXT)
    names: dict[str, Any] = {"stage": "pretrain", "node": "pretrain", "identity": {}, "parents": {}, "summary": {}}
    return artifact.publish(folder / "build", folder / "final", **names)


def torch_arm(model: Any, options: argparse.Namespace) -> Arm:
    """Return prefill and decode of a decoder in torch."""
    prompt = torch.arange(options.prompt)[None] % 256 + 4
    state: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill() -> None:
        state["cache"] = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode() -> None:
        for token in range(options.tokens):
            model(input_ids=torch.tensor([[token + 4]]), past_key_values=state["cache"], use_cache=True)

    return prefill, decode


def llama_cpp_arm(path: Path, options: argparse.Namespace) -> Arm:
    """Return prefill and decode of a GGUF file in llama.cpp."""
    from cyllama.llama import llama_cpp

    model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    parameters = llama_cpp.LlamaContextParams()
    parameters.n_ctx, parameters.n_batch = CONTEXT, CONTEXT
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
    context = llama_cpp.LlamaContext(model, parameters, verbose=False)

    def feed(tokens: range, start: int) -> None:
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for offset, token in enumerate(tokens):
            batch.add(token % 256 + 4, start + offset, [0], offset + 1 == len(tokens))
        assert context.decode(batch) == 0

    def prefill() -> None:
        context.kv_cache_clear()
        feed(range(options.prompt), 0)

    def decode() -> None:
        for token in range(options.tokens):
            feed(range(token, token + 1), options.prompt + token)

    return prefill, decode


def onnx_arm(folder: Path, options: argparse.Namespace) -> Arm:
    """Return the forward pass of an encoder in onnxruntime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / onnx.MODEL), settings, providers=["CPUExecutionProvider"])
    ids = (torch.arange(options.prompt)[None] % 256 + 4).numpy()
    return lambda: session.run(None, {"input_ids": ids, "attention_mask": ids * 0 + 1}), None


def measure(arms: dict[str, Arm], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return arm -> prefill and decode seconds of each round; the first round warms up and is left out."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            for phase, call in zip(("prefill", "decode"), arm, strict=True):
                if call is not None:
                    took = timed(call)
                    if number:
                        seconds[name][phase].append(took)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call: CPU time on one thread."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def rows(seconds: dict[str, dict[str, list[float]]], bases: dict[str, str]) -> list[dict[str, Any]]:
    """Return a row for each arm and phase: median milliseconds, and how many times as fast as its base."""
    found = []
    for name, base in bases.items():
        for phase, times in seconds[name].items():
            if times:
                ratios = [before / after for before, after in zip(seconds[base][phase], times, strict=True)]
                slow, fast = (1000 * statistics.median(seconds[n][phase]) for n in (base, name))
                row = {"arm": name, "base": base, "phase": phase, "base_ms": round(slow, 2), "ms": round(fast, 2)}
                found.append({**row, "speedup": round(statistics.median(ratios), 2)})
    return found


def arms_of(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Arm], dict[str, str]]:
    """Write all models and return the arms, and for each int8 arm what it is compared with."""
    parent = write_model(folder / "decoder", options, "decoder")
    table = CompressConfig.model_validate({"method": "rtn", "bits": 8, "clip": "max", "baseline_documents": 0})
    (folder / "child").mkdir()
    context = StageContext(node="compress.child", scratch=folder, compute=ComputeConfig(device="cpu"))
    run(table, {"prepare": parent, "model": parent}, folder / "child", context)
    arms = {
        "torch float32": torch_arm(load_model(parent.path / "model"), options),
        "torch int8": torch_arm(int8_inference.load_model(folder / "child" / "model"), options),
    }
    bases = {"torch int8": "torch float32"}
    for precision in ("f32", "q8_0"):
        gguf.write(parent.path / "model", folder / f"{precision}.gguf", precision)
        arms[f"llama.cpp {precision}"] = llama_cpp_arm(folder / f"{precision}.gguf", options)
    bases["llama.cpp q8_0"] = "llama.cpp f32"
    if options.encoder:
        encoder = write_model(folder / "encoder", options, "encoder")
        for precision in ("fp32", "int8"):
            (folder / precision).mkdir()
            onnx.write(encoder.path / "model", folder / precision, precision)  # type: ignore[arg-type]
            arms[f"onnxruntime {precision}"] = onnx_arm(folder / precision, options)
        bases["onnxruntime int8"] = "onnxruntime fp32"
    return arms, bases


def main(arguments: list[str] | None = None) -> int:
    """Print one row for each int8 arm and phase."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name, value in (("width", 1024), ("layers", 4), ("prompt", 128), ("tokens", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--encoder", action="store_true", help="also an encoder in onnxruntime")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        arms, bases = arms_of(Path(root), options)
        found = rows(measure(arms, options.rounds), bases)
    info = Path("/proc/cpuinfo")
    flags = [f for f in ("avx512_vnni", "avx_vnni", "amx_int8") if info.exists() and f in info.read_text().split()]
    if options.json:
        print(json.dumps({"flags": flags, "threads": torch.get_num_threads(), "rows": found}))
    else:
        print(f"{torch.get_num_threads()} threads, int8 instructions: {', '.join(flags) or 'none'}")
        for row in found:
            print("{arm:18} {phase:8} {base_ms:9} ms -> {ms:9} ms   {speedup} x as fast".format(**row))
    return 0 if all(row["speedup"] > 1.0 for row in found if row["arm"] == "torch int8") else 1


if __name__ == "__main__":
    sys.exit(main())
