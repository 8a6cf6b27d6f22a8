"""Estimate of a stage's time on a CPU, from its FLOPs and a short measurement of this machine."""

from __future__ import annotations

import time

import torch

# Rate of a training step, as a share of that of a plain matmul. Measured with SmolLM2-135M in float32 on an AMD EPYC
# on one thread, 16 rows a step: 0.74 to 0.84 in forward and backward passes; the rest of a step takes time as well.
TRAINING_SHARE = 0.7
_ROWS = 512
_MAX_WIDTH = 4096
_MEASURED_SECONDS = 0.3


def measure_matmul_rate(width: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the FLOP/s of a matmul with a square weight, with torch's number of threads. It takes half a second.

    Args:
        width: rows and columns of the weight; larger ones are cut.
        dtype: of both factors.
    """
    width = min(width, _MAX_WIDTH)
    left, right = torch.ones(_ROWS, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    left @ right  # the first product also allocates
    runs, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < _MEASURED_SECONDS:
        left @ right
        runs += 1
    return 2.0 * _ROWS * width * width * runs / seconds


def estimate_seconds(flops: float, matmul_rate: float) -> float:
    """Return the seconds that training takes for its FLOPs on a CPU with a matmul rate in FLOP/s."""
    return flops / (matmul_rate * TRAINING_SHARE)


def format_duration(seconds: float) -> str:
    """Return a duration in the unit in which its number is easy to read."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
