"""What a benchmark says about the machine it ran on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def describe_hardware() -> dict[str, Any]:
    """Return the machine's kind, its number of CPUs and their name, and the GPU if there is one."""
    found = {"machine": platform.machine(), "cpus": os.cpu_count(), "processor": _read_processor()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def name_device() -> str:
    """Return ``cpu``, or the GPU's short name such as ``h100``: what results are called by."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    short = re.search(r"\b[a-z]{1,3}\d{2,4}[a-z]?\b", name)
    return short.group() if short else re.sub(r"\W+", "_", name)


def _read_processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
