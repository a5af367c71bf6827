"""Latency and peak memory of one model, measured in a process that does nothing else.

`python -m pipelines.evaluation.probes.latency MODEL_DIR` prints one JSON object. `measure` starts it from the stage.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.core import parent_guard, program
from pipelines.core.errors import TransientError
from pipelines.evaluation.probe import Measurement, Probe, ProbeSettings, Subject

_AT_WORK = threading.Lock()
"""Two measurements at once would measure each other."""


class LatencySettings(ProbeSettings):
    """What is timed."""

    prompt_tokens: int = Field(default=128, ge=2, le=1 << 20, description="Tokens of the prompt (prefill).")
    new_tokens: int = Field(default=16, ge=1, le=1 << 16, description="Tokens generated one by one (decode).")
    repeats: int = Field(default=5, ge=1, le=1000, description="Repeats; the median is reported.")
    timeout_s: float = Field(default=300.0, gt=0, description="Seconds after which the probe is given up.")


class Latency(Probe[LatencySettings]):
    """Milliseconds a token and bytes of memory."""

    families = frozenset({"decoder", "encoder"})
    observes = True
    Settings = LatencySettings

    def _measure(self, subject: Subject, settings: LatencySettings) -> Measurement:
        with _AT_WORK:
            return Measurement(observation=measure(subject.folder, settings, subject.scorer.device))


def measure(model: Path, settings: LatencySettings, device: str = "cpu") -> dict[str, Any]:
    """Measure a model in a fresh process.

    Returns:
        `prefill_ms_per_token` and `decode_ms_per_token` (medians over repeats; decode is None for an encoder),
        `peak_memory_bytes` of the process, `model_memory_bytes` (the part of the peak above what the libraries took
        before the model was loaded), `load_s` and `threads`.

    Raises:
        TransientError: the process failed or did not end in time.
    """
    # The guard lets the kernel end the probe when this process is killed.
    command = parent_guard.command()
    command += program.command("pipelines.evaluation.probes.latency", str(model.resolve()), "--device", device)
    command += ["--prompt-tokens", str(settings.prompt_tokens), "--new-tokens", str(settings.new_tokens)]
    command += ["--repeats", str(settings.repeats)]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=settings.timeout_s, env=program.environment()
        )
    except subprocess.TimeoutExpired:
        raise TransientError(
            f"the latency probe of {model} did not end in {settings.timeout_s:g} s",
            hint="raise evaluate.probes.latency.timeout_s, or set evaluate.probes.latency.enabled = false",
        ) from None
    if finished.returncode:
        raise TransientError(
            f"the latency probe of {model} ended with exit code {finished.returncode}: "
            f"{finished.stderr.strip()[-500:]}",
            hint="run again; set evaluate.probes.latency.enabled = false to do without it",
        )
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


# ---- inside the process -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(_time_model(parser.parse_args(arguments))), flush=True)


def _time_model(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pipelines.measure import scoring

    libraries = peak_memory()
    started = time.perf_counter()
    scorer = scoring.load(options.model, options.device)
    loaded_s = time.perf_counter() - started
    with torch.inference_mode():
        prefill_s, decode_s = _time(scorer, options)
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_memory()
    return {
        "prefill_ms_per_token": 1000.0 * prefill_s / options.prompt_tokens,
        "decode_ms_per_token": None if decode_s is None else 1000.0 * decode_s / options.new_tokens,
        "peak_memory_bytes": peak,
        "model_memory_bytes": peak if options.device == "cuda" else peak - libraries,
        "load_s": loaded_s,
        "threads": torch.get_num_threads(),
    }


def _time(scorer: Any, options: argparse.Namespace) -> tuple[float, float | None]:
    """Return the median seconds of one prefill and of one decode of all new tokens."""
    import torch

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    vocabulary = scorer.model.config.vocab_size
    prompt = (torch.arange(options.prompt_tokens, device=options.device) * 7919 % vocabulary)[None]
    encoder = scorer.family == "encoder"
    options_of_prefill = {} if encoder else {"use_cache": True, "logits_to_keep": 1}
    prefills, decodes = [], []
    for _ in range(options.repeats + 1):
        seconds, output = _timed(functools.partial(scorer.model, input_ids=prompt, **options_of_prefill), wait)
        prefills.append(seconds)
        if not encoder:
            decodes.append(_timed(functools.partial(_decode, scorer.model, output, options.new_tokens), wait)[0])
    # The first round warms up caches and lazily unpacked weights.
    return statistics.median(prefills[1:]), None if encoder else statistics.median(decodes[1:])


def _decode(model: Any, output: Any, tokens: int) -> Any:
    for _ in range(tokens):
        ids = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
    return output


def _timed(call: Callable[[], Any], wait: Callable[[], None]) -> tuple[float, Any]:
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - started, result


def peak_memory() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: after fork and exec it still holds the peak of the parent.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
