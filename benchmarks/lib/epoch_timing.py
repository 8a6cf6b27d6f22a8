"""Timing of an epoch's parts for both sides of benchmarks/cf_throughput.py; imports torch only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
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


class TimedBatches:
    """Batches of an epoch, with the time that they take to load and to train.

    Attributes:
        loading: seconds in which batches were loaded.
        trained: number of batches that are counted.
    """

    def __init__(self, batches: Iterable[Any], max_batches: int | None, calls: Sequence[TimedCall]) -> None:
        """Prepare the measurement.

        Args:
            batches: of an epoch.
            max_batches: count only so many. The first batch, with the order of the whole epoch, is then not counted.
            calls: parts of the training, timed over the same batches.
        """
        self._batches, self._max_batches, self._calls = batches, max_batches, calls

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        self._restart()
        iterator = iter(self._batches)
        for number in count():
            if self._max_batches is not None and number > self._max_batches:
                return
            started = time.perf_counter()
            batch = next(iterator, None)
            self.loading += time.perf_counter() - started
            if batch is None:
                return
            yield batch
            self.trained += 1
            if self._max_batches is not None and number == 0:
                self._restart()

    def _restart(self) -> None:
        self.loading, self.trained, self._started = 0.0, 0, (time.perf_counter(), time.process_time())
        for call in self._calls:
            call.seconds = 0.0

    def measure(self) -> dict[str, float]:
        """Return seconds and CPU seconds since the first batch that is counted, and the number of batches."""
        started, started_cpu = self._started
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "batches": self.trained}


def list_operators(run: Callable[[], Any], limit: int = 8) -> list[dict[str, Any]]:
    """Run under the profiler and return the operators with the largest time, without that of their callees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operator": event.key, "share": round(event.self_cpu_time_total / total, 3), "calls": event.count}
        for event in events[:limit]
    ]


def reset_peak_memory() -> None:
    """Reset the peak of this process's resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak_memory() -> float:
    """Return the peak of this process's resident memory since the last reset, in GiB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20
