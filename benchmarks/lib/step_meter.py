"""A side's end of the measurement: read requests, work through a batch, answer with its time and memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from collm_dist.monitoring import PeakMeter

REST = "rest"

# Works through the batch of a number; a training step of ours returns its loss.
Work = Callable[[int], float | None]


def start_meter(device: torch.device) -> PeakMeter:
    """Return a meter of how far memory rises above its present level."""
    with PeakMeter(device, from_first=True) as meter:
        return meter


def measure(work: Work, number: int, device: torch.device, meter: PeakMeter | None = None) -> dict[str, float]:
    """Work through a batch and return its ``seconds``, ``extra_bytes`` and, if known, ``loss``.

    Args:
        work: the side's work.
        number: of the batch.
        device: the process's device.
        meter: None = memory is measured above its present level.
    """
    with meter or PeakMeter(device) as meter:
        started = time.perf_counter()
        loss = work(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    answer = {"seconds": seconds, "extra_bytes": meter.extra_bytes}
    return answer if loss is None else answer | {"loss": loss}


def answer_requests(work: Work, device: torch.device, meter: PeakMeter, channel: Any) -> None:
    """Answer each request for a batch with its measurement."""
    for number in read_requests(channel):
        send(channel, measure(work, number, device, meter))


def read_requests(channel: Any) -> Iterator[int]:
    """Yield the numbers of the requested batches. ``rest`` empties the cache of a GPU's allocator."""
    for line in iter(sys.stdin.readline, ""):
        if line.strip() != REST:
            yield int(line)
            continue
        torch.cuda.empty_cache()
        send(channel, {})


def send(channel: Any, answer: dict[str, Any]) -> None:
    """Write a line of JSON."""
    print(json.dumps(answer), file=channel, flush=True)
