"""Memory of a process and of its device. Torch is imported late, so that monitoring alone does not load it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from collm_dist.errors import LaunchError

if TYPE_CHECKING:
    import torch


def measure_peak_gib(device: torch.device) -> float:
    """Return this process's peak memory so far, in GiB: GPU memory on a GPU, else resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure_total_gib(device: torch.device) -> float:
    """Return the total memory in GiB: the GPU's, else the machine's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return psutil.virtual_memory().total / 2**30


class PeakMeter:
    """Context manager that measures the rise of memory above its level on entry.

    Attributes:
        extra_bytes: the rise, set on exit: GPU memory on a GPU, else this process's resident memory (Linux).
    """

    def __init__(self, device: torch.device, *, from_first: bool = False) -> None:
        """Select the device.

        Args:
            device: this process's device.
            from_first: on later entries, measure above the level of the first entry. Memory that the allocator keeps in
                between then counts, and does not have to be released, which takes a CPU time.
        """
        self._device, self._from_first = device, from_first
        self._start: int | None = None
        self.extra_bytes = 0

    def __enter__(self) -> PeakMeter:
        """Reset the peak."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            if self._start is None:
                self._start = torch.cuda.memory_allocated(self._device)
        else:
            if sys.platform != "linux":
                raise LaunchError(
                    "memory can be measured only on Linux or on a GPU; set max_tokens_per_micro_batch to a number"
                )
            if self._start is None:
                # Free memory that the allocator keeps would hide a new allocation of the same size.
                ctypes.CDLL(None).malloc_trim(0)
                self._start = _read_status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        assert self._start is not None
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
            self.extra_bytes = torch.cuda.max_memory_allocated(self._device) - self._start
        else:
            self.extra_bytes = max(_read_status("VmHWM") - self._start, 0)
        if not self._from_first:
            self._start = None


def _read_status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
