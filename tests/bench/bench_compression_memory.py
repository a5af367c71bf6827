"""Peak memory and CPU time of compressing a random decoder, beside llm-compressor and beside what `ingot plan` says.

    OMP_NUM_THREADS=1 python tests/bench/bench_compression_memory.py [--models 30m 350m 1300m] [--methods rtn gptq awq]

Each compression is a process of its own: from a model folder on the disk to a written variant on the disk, 4 bits in
groups of 128, on 16 calibration sequences of 512 tokens, without comparisons (llm-compressor makes none). Memory is
the peak resident memory of that process, time its CPU time. llm-compressor is found where it is installed:
`pip install --no-deps --target DIR llmcompressor loguru`, then `PYTHONPATH=DIR:.`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from pipelines.compression import estimate, stage
from pipelines.compression.config import CompressConfig
from pipelines.core import artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.data import shards
from pipelines.data.packing import Block
from pipelines.training import estimate as training_estimate

SAMPLES, LENGTH, VOCABULARY = 16, 512, 16_384
IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
MODELS: dict[str, dict[str, int]] = {
    "30m": {"width": 512, "ffn_width": 1408, "layers": 6, "heads": 8},
    "350m": {"width": 1024, "ffn_width": 2816, "layers": 25, "heads": 16},
    "1300m": {"width": 2048, "ffn_width": 5632, "layers": 24, "heads": 16},
}


def architecture(name: str) -> ArchitectureConfig:
    """Return the shape of a model."""
    return ArchitectureConfig.model_validate({"vocab_size": VOCABULARY, "max_positions": LENGTH, **IDS, **MODELS[name]})


def make(name: str, folder: Path) -> None:
    """Write a random model and random data as artifacts."""
    build(architecture(name), seed=0).save_pretrained(folder / "m" / "model", max_shard_size="500MB")
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(4, VOCABULARY, (SAMPLES, LENGTH), generator=generator).numpy()
    data = folder / "d"
    data.mkdir()
    entries = shards.write(
        [Block.of_rows(tokens_NT)], data, "train", sequence_length=LENGTH, dtype="uint16", shard_bytes=1 << 26
    )
    index = {"format": 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY, "dtype": "uint16"} | IDS
    split = {"shards": entries, "sequences": SAMPLES}
    (data / "index.json").write_text(json.dumps(index | {"splits": {"train": split}}))
    for kind, place in (("pretrain", "m"), ("prepare", "d")):
        artifact.publish(folder / place, folder / kind, stage=kind, node=kind, identity={}, parents={}, summary={})


def table(method: str) -> dict[str, Any]:
    """Return the table of the compress stage."""
    return {"method": method, "bits": 4, "group_size": 128, "samples": SAMPLES, "baseline_documents": 0}


def ours(method: str, folder: Path, out: Path) -> None:
    """Compress with the stage."""
    inputs = {"model": artifact.load(folder / "pretrain"), "prepare": artifact.load(folder / "prepare")}
    context = StageContext("compress.x", scratch=out / "scratch", compute=ComputeConfig(device="cpu"))
    stage.run(CompressConfig.model_validate(table(method)), inputs, out, context)


def llm_compressor(method: str, folder: Path, out: Path) -> None:
    """Compress with llm-compressor's `oneshot`."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import awq, quantization
    from transformers import AutoModelForCausalLM

    from pipelines.compression import calibration

    model = AutoModelForCausalLM.from_pretrained(folder / "pretrain" / "model", dtype="auto")
    tokens_NT = calibration.sample_tokens(folder / "prepare", samples=SAMPLES, seed=0, masked=False)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    kinds = {"rtn": quantization.QuantizationModifier, "gptq": quantization.GPTQModifier, "awq": awq.AWQModifier}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = {"input_ids": tokens_NT.tolist(), "attention_mask": [[1] * LENGTH] * SAMPLES}
    oneshot(
        model=model,
        recipe=kinds[method](config_groups=groups, ignore=["lm_head"]),
        dataset=None if method == "rtn" else Dataset.from_dict(rows),
        num_calibration_samples=SAMPLES,
        max_seq_length=LENGTH,
        batch_size=8,
    )
    model.save_pretrained(out / "model")


SIDES = {"ours": ours, "llm-compressor": llm_compressor}


def child(side: str, method: str, folder: Path) -> None:
    """Compress once, and print the peak of this process and its CPU time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        started = time.process_time()
        SIDES[side](method, folder, Path(out))
        seconds = time.process_time() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"bytes": peak, "seconds": round(seconds, 1)}))


def measure(side: str, method: str, folder: Path) -> dict[str, Any]:
    """Run `child` in a process of its own; what it says, or its last line where it fails."""
    command = [sys.executable, __file__, "--child", side, method, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or "no message").splitlines()[-1][:200]}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def predicted(name: str, method: str) -> dict[str, Any]:
    """Return the peak memory that the plan says for the same compression."""
    config = CompressConfig.model_validate(table(method))
    parts = estimate.memory(config, training_estimate.shape_facts(architecture(name)), LENGTH, VOCABULARY)
    return {"model": name, "method": method, "side": "plan", "bytes": sum(parts.values()), "parts": parts}


def main() -> int:
    """Print a row for each model, method and side."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["30m", "350m"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            make(name, Path(temporary))
            for method in options.methods:
                print(json.dumps(predicted(name, method)), flush=True)
                for side in options.sides:
                    row = {"model": name, "method": method, "side": side}
                    print(json.dumps(row | measure(side, method, Path(temporary))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
