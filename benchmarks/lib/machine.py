"""Provenance of a benchmark's result: command, date, hardware and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TUNING_PACKAGES = ("torch", "transformers", "peft", "deepspeed")


def describe_run(*packages: str) -> dict[str, Any]:
    """Return the provenance of a result: ``command``, ``date``, ``hardware`` and ``versions``.

    Args:
        packages: distributions whose versions count.
    """
    return {
        "command": _describe_command(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": describe_hardware(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def describe_hardware() -> dict[str, Any]:
    """Return the machine's architecture, number of CPUs and processor, and the GPU if there is one."""
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "processor": _read_cpuinfo("model name")}
    return hardware | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def name_device() -> str:
    """Return ``cpu``, or a short name of the GPU such as ``h100``, for the names of results."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    short = re.search(r"\b[a-z]{1,3}\d{2,4}[a-z]?\b", name)
    return short.group() if short else re.sub(r"\W+", "_", name)


def list_cpu_flags() -> set[str]:
    """Return the instruction sets of the CPU (Linux)."""
    return set(_read_cpuinfo("flags").split())


def _read_cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), platform.processor())


def _describe_command() -> str:
    """Return the command line; absolute paths are cut to their last part, since they belong to one machine."""
    spec = sys.modules["__main__"].__spec__
    words = [re.sub(r"(^|=)/(?:.*/)?([^/]+)/?$", r"\1\2", word) for word in sys.argv[1:]]
    return shlex.join(["python", "-m", spec.name if spec else Path(sys.argv[0]).stem, *words])
