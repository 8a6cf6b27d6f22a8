"""Settings of the heap that tensors on a CPU come from: a training step takes three fifths of the memory, no longer.

PyTorch asks glibc for aligned memory. glibc takes more than that and frees what is left over at both ends; before
version 2.39 it keeps these slivers in caches for small objects, where nothing joins them to their neighbours again
(its bug 30723). So what a freed tensor leaves is just too small for the next one of the same size, and the heap grows
and grows. Without those caches it does not. Nor do freed tensors go back to the system then, from which every page of
the next ones would have to be asked for (benchmarks/heap_settings.py).

The settings are read when a process starts, and nothing can change them later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
# 32 MiB is the most that all versions take; by default it grows up to there as tensors are freed, but not if the other
# threshold is given.
SETTINGS = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "tcache_count": 0,
        "mxfast": 0,
        "mmap_threshold": 32 << 20,
        "trim_threshold": 1 << 40,
    }.items()
)
_GPUS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def choose_heap(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a process that computes on a CPU wants in its environment besides.

    Nothing where tensors are elsewhere, as on a machine with a GPU, where there is another heap, and where somebody has
    chosen settings: an empty value keeps glibc's own.
    """
    has_gpu = any(path.exists() for path in _GPUS)
    if VARIABLE in environment or sys.platform != "linux" or has_gpu:
        return {}
    return {VARIABLE: SETTINGS}


def restart_with_heap() -> None:
    """Start this process anew with the settings, if it wants any; to be called before it has done anything."""
    if settings := choose_heap(os.environ):
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(command[0], command, {**os.environ, **settings})  # noqa: S606 (what is running already)
