"""Compares our compression with maintained libraries at equal bits: quality on held-out text and time, in one run.

    python tests/bench/bench_compression.py [--bits 3 4 8] [--group 0 128] [--json]

Model and text are the bench of the tests (`flows/recipes/bench.toml`, built once). Libraries that are not installed are
left out, and named. llm-compressor pins older versions of transformers and compressed-tensors than ours, yet runs with
ours when installed beside them: `pip install --no-deps --target DIR llmcompressor loguru`, then `PYTHONPATH=DIR:.`.

Both sides see the same 64 calibration sequences, use the same public grids (symmetric, a scale a row or a group that
reaches the largest weight, token matrices left alone), and are judged by the same loss. Times are CPU seconds of one
thread, from the parent's folder to the rounded weights; ours include the null arms and errors of each layer. Both sides
take turns, and the median of their rounds counts. Ends with 1 when ours is more than 1 % worse in perplexity than a
library at any width, or slower by more than `TIMING_NOISE` and `START_SECONDS`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from models.compression import registry
from pipelines.compression import calibration, sequential, stage
from pipelines.compression.config import CompressConfig
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.modelio import meta_init
from pipelines.modelio.load import load_model

SAMPLES = 64
WORST_PERPLEXITY = 1.01
TIMING_NOISE = 1.1
"""Medians of the same side differ by so much between two runs of this bench on a busy machine."""
START_SECONDS = 0.01
"""What the walk costs once, whatever the size of the model: a second skeleton, one opening of the file for a tensor."""


def bench_model() -> Any:
    """Return the bench of the tests: prepared data, trained parent, loss on held-out text."""
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("shared", path)
    assert spec is not None
    assert spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    sys.modules["shared"] = shared
    spec.loader.exec_module(shared)
    return shared.build_bench()


# ---- arms: each returns the parent with its weights rounded; its time is that of the call

Arm = Callable[[str, int, int, Any], PreTrainedModel]


def ours(method: str, bits: int, group: int, bench: Any) -> PreTrainedModel:
    """Compress block by block; weights are rounded in place, which leaves out the files of the stage."""
    source = bench.parent.path / "model"
    table = {"method": method, "bits": bits, "group_size": group, "clip": "max", "samples": SAMPLES}
    config, model = CompressConfig.model_validate(table), meta_init.build(source)
    inputs = {"prepare": bench.prepare, "model": bench.parent}
    context = StageContext("bench", scratch=Path(tempfile.mkdtemp()), compute=ComputeConfig(device="cpu"))
    run = CompressionRun.open(config, inputs, context.scratch, context, stage.run)
    names = sequential.targets(run.base, ())
    for name in set(run.reader.names()) - {f"{name}.weight" for name in names}:
        meta_init.set_parameter(model, name, run.reader.dense(name))
    for block in sequential.compress_blocks(run, Assignment(registry.weight(method), config.parameters, names)):
        for name in block:
            meta_init.set_parameter(model, f"{name}.weight", run.base.get_parameter(f"{name}.weight"))
    model.tie_weights()
    return model


def llm_compressor(method: str, bits: int, group: int, bench: Any) -> PreTrainedModel:
    """Quantize with llm-compressor's `oneshot`; weights are rounded in place."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    model = load_model(bench.parent.path / "model")
    tokens_NT = calibration.sample_tokens(bench.prepare.path, samples=SAMPLES, seed=0, masked=False)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    kind = GPTQModifier if method == "gptq" else QuantizationModifier
    data = Dataset.from_dict({"input_ids": tokens_NT.tolist(), "attention_mask": np.ones_like(tokens_NT).tolist()})
    oneshot(
        model=model,
        recipe=kind(config_groups=groups, ignore=["lm_head"]),
        dataset=data if method == "gptq" else None,
        num_calibration_samples=SAMPLES,
        max_seq_length=tokens_NT.shape[1],
        batch_size=8,
    )
    return model


def torchao(method: str, bits: int, group: int, bench: Any) -> PreTrainedModel:
    """Round to nearest with torchao: int8 a row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load_model(bench.parent.path / "model")
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


LIBRARIES: dict[str, tuple[str, Arm, Callable[[str, int, int], bool]]] = {
    "llm-compressor": ("llmcompressor", llm_compressor, lambda method, bits, group: True),  # noqa: ARG005
    "torchao": ("torchao", torchao, lambda method, bits, group: (method, bits, group) == ("rtn", 8, 0)),
}
"""Name -> module, arm, and whether it has this method at this width."""


@contextlib.contextmanager
def timer(seconds: list[float]) -> Iterator[None]:
    """Append the CPU seconds of the block."""
    started = time.process_time()
    yield
    seconds.append(time.process_time() - started)


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each method, width and library, and the libraries that are not installed."""
    bench = bench_model()
    base = bench.loss(load_model(bench.parent.path / "model"))
    missing = [name for name, (module, *_) in LIBRARIES.items() if importlib.util.find_spec(module) is None]
    rows: list[dict[str, Any]] = []
    for method, bits, group in ((m, b, g) for m in options.methods for b in options.bits for g in options.group):
        for name, (_, arm, has) in LIBRARIES.items():
            if name in missing or not has(method, bits, group):
                continue
            ratios, times = compared((ours, arm), (method, bits, group, bench), base, options.rounds)
            row = {"method": method, "bits": bits, "group": group, "library": name}
            row |= {"ours": round(ratios[0], 5), "theirs": round(ratios[1], 5)}
            row |= {"perplexity": round(ratios[0] / ratios[1], 5), "time": round(times[0] / times[1], 3)}
            rows.append(row | {"seconds": [round(t, 3) for t in times]})
            print(json.dumps(rows[-1]) if options.json else _line(rows[-1]), flush=True)
    return rows, missing


def compared(
    sides: Sequence[Arm], place: tuple[str, int, int, Any], base: float, rounds: int
) -> tuple[list[float], list[float]]:
    """Return each side's perplexity over the parent's, and the median seconds of rounds in which the sides take turns.

    A round before the first is not counted: whoever comes first imports and fills caches.
    """
    models = [side(*place) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, spent in zip(sides, seconds, strict=True):
            with timer(spent):
                side(*place)
    ratios = [math.exp(place[3].loss(model) - base) for model in models]
    return ratios, [statistics.median(spent) for spent in seconds]


def _line(row: dict[str, Any]) -> str:
    what = f"{row['method']} {row['bits']} bit, {'groups of ' + str(row['group']) if row['group'] else 'a row'}"
    return (
        f"{what:24} ours {row['ours']:.4f}, {row['library']} {row['theirs']:.4f}: ratio {row['perplexity']:.4f}; "
        f"time {row['seconds'][0]} s against {row['seconds'][1]} s"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print perplexity over the parent's, ours and theirs, and the ratio of the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--group", nargs="+", type=int, default=[0, 128])
    parser.add_argument("--rounds", type=int, default=7, help="each side is timed so often; the median counts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, missing = measure(options)
    if missing:
        print(f"not installed, so not compared: {', '.join(missing)}", file=sys.stderr)
    return 0 if all(holds(row) for row in rows) else 1


def holds(row: dict[str, Any]) -> bool:
    """Return whether ours is no worse than 1 % and no slower, timing noise apart."""
    mine, theirs = row["seconds"]
    return row["perplexity"] <= WORST_PERPLEXITY and mine <= max(theirs * TIMING_NOISE, theirs + START_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
