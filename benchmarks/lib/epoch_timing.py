"""Timing of an epoch's parts for both sides of benchmarks/cf_throughput.py; imports torch only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class TimedCall:
    """A function with the total time of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        started = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return result


def list_operators(run: Callable[[], Any], count: int = 8) -> list[dict[str, Any]]:
    """Run under the profiler and return the operators with the largest time, without that of their callees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operator": event.key, "share": round(event.self_cpu_time_total / total, 3), "calls": event.count}
        for event in events[:count]
    ]
