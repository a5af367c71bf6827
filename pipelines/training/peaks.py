"""What devices are stated to compute, in operations per second. Without torch: plans read it."""

from __future__ import annotations

STATED_BF16 = (("H200", 989.4e12), ("H100", 989.4e12), ("A100", 312e12), ("L40S", 362e12), ("L4", 121e12))
"""Dense bf16 peak of GPUs by a word of their name, from NVIDIA's data sheets."""

_STATED_FP32 = (("H200", 67e12), ("H100", 67e12), ("A100", 19.5e12), ("L40S", 91.6e12), ("L4", 30.3e12))
"""The same without tensor cores, as torch computes float32 products by default."""

_DEFAULT_GPU = "A100"
_CPU_THREAD = {"fp32": 40e9, "bf16": 10e9}
"""A thread of a server CPU with AVX2 or AVX-512, its neighbours at work; bf16 without instructions of its own."""


def stated_bf16(name: str) -> tuple[str, float] | None:
    """Return (word of the name, peak in bf16) of a GPU, None for one that is not in the table."""
    return next(((word, flops) for word, flops in STATED_BF16 if word in name), None)


def stated(device: str, precision: str, *, gpu: str = "", threads: int = 1) -> tuple[float, str]:
    """Return the stated peak of one rank and where it is from, where nothing has been measured.

    Args:
        device: cpu or cuda.
        precision: fp32 or bf16.
        gpu: name of the GPU; one that is not known counts as an A100.
        threads: CPU threads of a rank.
    """
    if device == "cpu":
        flops = _CPU_THREAD[precision] * threads
        return flops, f"{flops / 1e9:.0f} GFLOP/s a rank, assumed"
    table = dict(STATED_BF16 if precision == "bf16" else _STATED_FP32)
    word = next((known for known in table if known in gpu), _DEFAULT_GPU)
    said = "data sheet of the " if word in gpu else "assumed, an "
    return table[word], f"{table[word] / 1e12:.0f} TFLOP/s a rank, {said}{word}"
