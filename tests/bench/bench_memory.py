"""Peak memory and CPU time of compressing a random decoder, each method in a process of its own.

    OMP_NUM_THREADS=1 python tests/bench/bench_memory.py [--layers 24] [--methods rtn gptq awq] [--threshold 0 1048576]

The default has 311 M parameters (24 blocks of width 1024) in float32, 1.2 GB. What is told of a run is the largest
resident memory of its process, beside that of the same process before it opened the model; `--threshold` sets glibc's
`MALLOC_MMAP_THRESHOLD_` (0: as it is), above which freed memory goes back to the system at once. The base is written in
shards of 256 MB, no comparison with baselines is made, and calibration sees 16 sequences of 256 tokens. llm-compressor
is measured beside ours where it is installed; it loads the model as a whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAMPLES, LENGTH, VOCABULARY = 16, 256, 260
IDS = {"bos_id": 256, "eos_id": 257, "pad_id": 258, "mask_id": 259}


def make(folder: Path, layers: int, width: int) -> None:
    """Write a random decoder and random text, as artifacts."""
    from models.architectures.build import build
    from models.architectures.config import ArchitectureConfig
    from pipelines.core import artifact
    from pipelines.data import shards

    sizes: dict[str, Any] = {"width": width, "ffn_width": width * 11 // 4, "layers": layers, "heads": width // 64}
    shape = ArchitectureConfig(vocab_size=VOCABULARY, max_positions=LENGTH, **IDS, **sizes)
    build(shape, seed=0).save_pretrained(folder / "base" / "model", max_shard_size="256MB")
    tokens = np.random.default_rng(0).integers(0, 256, (SAMPLES, LENGTH))
    entries = shards.write(
        [tokens], folder / "text", "train", sequence_length=LENGTH, dtype="uint16", shard_bytes=1 << 20
    )
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16", **IDS}
    splits = {"train": {"shards": entries, "sequences": SAMPLES}}
    (folder / "text" / "index.json").write_text(json.dumps({**index, "splits": splits}))
    for name, stage in (("base", "pretrain"), ("text", "prepare")):
        artifact.publish(
            folder / name, folder / f"{name}-done", stage=stage, node=stage, identity={}, parents={}, summary={}
        )


def ours(folder: Path, method: str, out: Path) -> None:
    """Compress the model as the stage does."""
    from pipelines.compression import stage
    from pipelines.compression.config import CompressConfig
    from pipelines.core import artifact
    from pipelines.core.compute import ComputeConfig
    from pipelines.core.stage import StageContext

    table = {"method": method, "bits": 4, "group_size": 128, "clip": "max", "samples": SAMPLES, "baseline_documents": 0}
    inputs = {"model": artifact.load(folder / "base-done"), "prepare": artifact.load(folder / "text-done")}
    context = StageContext(node="compress.x", scratch=out, compute=ComputeConfig(device="cpu"))
    stage.run(CompressConfig.model_validate(table), inputs, out, context)


def theirs(folder: Path, method: str, out: Path) -> None:
    """Compress the model with llm-compressor, and save it."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    from pipelines.compression import calibration
    from pipelines.modelio.load import load_model

    model = load_model(folder / "base-done" / "model")
    tokens_NT = calibration.sample_tokens(folder / "text-done", samples=SAMPLES, seed=0, masked=False)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    kind = GPTQModifier if method == "gptq" else QuantizationModifier
    data = Dataset.from_dict({"input_ids": tokens_NT.tolist(), "attention_mask": np.ones_like(tokens_NT).tolist()})
    oneshot(
        model=model,
        recipe=kind(config_groups=groups, ignore=["lm_head"]),
        dataset=data if method == "gptq" else None,
        num_calibration_samples=SAMPLES,
        max_seq_length=LENGTH,
        output_dir=str(out),
    )


def memory(key: str) -> int:
    """Return `VmRSS` or `VmHWM`, the largest of it, of this process in bytes; `ru_maxrss` would be the parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def child(folder: Path, side: str, method: str) -> None:
    """Compress in this process and print what it took."""
    torch.set_num_threads(1)
    from pipelines.compression import stage  # noqa: F401 - its imports are not what is measured

    with tempfile.TemporaryDirectory(dir=folder) as place:
        before, started = memory("VmRSS"), time.process_time()
        {"ours": ours, "llm-compressor": theirs}[side](folder, method, Path(place))
        print(
            json.dumps({"before": before, "peak": memory("VmHWM"), "seconds": round(time.process_time() - started, 1)})
        )


def measured(folder: Path, side: str, method: str, threshold: int) -> dict[str, Any]:
    """Return what one run in a process of its own took."""
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(threshold)} if threshold else {})
    command = [sys.executable, __file__, "--child", side, method, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{side}, {method}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"side": side, "method": method, "threshold": threshold, **found}


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--threshold", nargs="+", type=int, default=[0])
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args(arguments)
    if options.child:
        side, method, folder = options.child
        child(Path(folder), side, method)
        return 0
    sides = ["ours", *(["llm-compressor"] if importlib.util.find_spec("llmcompressor") else [])]
    if len(sides) == 1:
        print("not installed, so not compared: llm-compressor", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), options.layers, options.width)
        size = sum(path.stat().st_size for path in (Path(temporary) / "base-done" / "model").glob("*.safetensors"))
        print(json.dumps({"model_bytes": size}), flush=True)
        for method in options.methods:
            for side in sides:
                if side == "llm-compressor" and method not in {"rtn", "gptq"}:
                    continue
                for threshold in options.threshold:
                    print(json.dumps(measured(Path(temporary), side, method, threshold)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
