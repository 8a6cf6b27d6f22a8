"""Golden records: results of a release as JSON, and their comparison with current results.

A record was made on one machine. There, with the same libraries, numbers are compared to the last bit. Elsewhere the
last bits of floating-point numbers may differ: numbers are compared with ``RELATIVE`` and ``ABSOLUTE``, hashes of
floating-point arrays and of files are passed over, and all else is compared as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent
# Set by ``python -m tests.golden.record``: records are then written instead of compared.
RECORD_VARIABLE = "COLLM_RECORD_GOLDEN"
# Largest difference seen between one thread and two: 0.006, in the bound of an AUC of a small slice, where a pair of
# rows in the other order is a step.
RELATIVE, ABSOLUTE = 2e-2, 1e-2
LIBRARIES = (
    "torch", "transformers", "numpy", "pyarrow", "peft", "deepspeed", "scikit-learn", "pandas", "safetensors",
    "tokenizers", "webdataset",
)  # fmt: skip
FLAGS = ("fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
# Hashes over files whose bytes libraries decide, or over floating-point numbers.
BOUND = re.compile(r"(content_hash|file_sha256|upstream\..*)$")
MAX_LINE, MAX_SHOWN, MAX_VALUE = 400, 20, 120
_DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def describe_machine() -> dict[str, Any]:
    """Return all that the last bits depend on."""
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text(encoding="utf-8") if cpu_info.exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"flags\s*:\s*(.*)", text)
    return {
        "cpu": model[1] if model else platform.processor(),
        "flags": [flag for flag in FLAGS if flags and flag in flags[1].split()],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()} {'.'.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def describe_array(array: Any, samples: int = 2) -> dict[str, Any]:
    """Return type, shape and hash of an array, and of floating-point numbers a few, evenly spaced."""
    values = np.ascontiguousarray(array)
    described = {
        "dtype": str(values.dtype),
        "shape": list(values.shape),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest()[:16],
    }
    if values.dtype.kind == "f" and values.size:
        places = np.linspace(0, values.size - 1, min(samples, values.size)).astype(int)
        described["some"] = [float(number) for number in values.reshape(-1)[places]]
    return described


def check_record(name: str, found: Any) -> None:
    """Compare with the record of a name; or write it, where records are being made.

    Raises:
        AssertionError: something differs; the message has the path and both values of each.
    """
    path = FOLDER / f"{name}.json"
    if os.environ.get(RECORD_VARIABLE):
        write_record(path, found)
        return
    compare(json.loads(path.read_text(encoding="utf-8")), found, path.name)


def write_record(path: Path, found: Any) -> None:
    """Write a record together with the machine that it was made on."""
    path.write_text(format_json({"made_on": describe_machine(), "found": found}) + "\n", encoding="utf-8")


def compare(record: dict[str, Any], found: Any, name: str) -> None:
    """Compare what is found now with a record as ``write_record`` writes it."""
    machine = describe_machine()
    exact = machine == record["made_on"]
    others = list_differences(record["made_on"], machine, "made_on", True)
    # By way of JSON, as the record went: tuples are lists then, and keys texts.
    differences = list_differences(record["found"], json.loads(json.dumps(found)), "$", exact)
    how = "exactly" if exact else f"with tolerance, since the machine is another one: {'; '.join(others)}"
    shown = "\n".join(differences[:MAX_SHOWN])
    assert not differences, f"{name}: {len(differences)} differences, compared {how}\n{shown}"


def list_differences(recorded: Any, found: Any, path: str, exact: bool) -> list[str]:
    """Return one line for each value that differs: its JSON path, the recorded one, and the one found."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        skipped = set() if exact else {key for key in recorded if _is_bound(recorded, key)}
        keys = [*recorded, *(key for key in found if key not in recorded)]
        absent = "(absent)"
        return [
            line
            for key in keys
            if key not in skipped
            for line in list_differences(recorded.get(key, absent), found.get(key, absent), f"{path}.{key}", exact)
        ]
    if isinstance(recorded, list) and isinstance(found, list):
        if len(recorded) != len(found):
            return [f"{path}: {len(recorded)} values recorded, {len(found)} found: {_cut(recorded)} / {_cut(found)}"]
        pairs = enumerate(zip(recorded, found, strict=True))
        return [line for place, pair in pairs for line in list_differences(*pair, f"{path}[{place}]", exact)]
    if recorded == found and type(recorded) is type(found):
        return []
    if not exact and _are_close(recorded, found):
        return []
    return [f"{path}: {_cut(recorded)} recorded, {_cut(found)} found"]


def _is_bound(described: dict[str, Any], key: str) -> bool:
    is_of_floats = key == "sha256" and str(described.get("dtype")).startswith("float")
    return is_of_floats or BOUND.fullmatch(key) is not None


def _are_close(recorded: Any, found: Any) -> bool:
    """Return whether two numbers are close, or two texts but for the decimal fractions in them, and these are."""
    if isinstance(recorded, float) and isinstance(found, int | float):
        return math.isclose(recorded, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(recorded, str) and isinstance(found, str) and _DECIMAL.sub("#", recorded) == _DECIMAL.sub("#", found):
        pairs = zip(_DECIMAL.findall(recorded), _DECIMAL.findall(found), strict=True)
        return all(_are_close(float(left), float(right)) for left, right in pairs)
    return False


def _cut(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "..."


def format_json(value: Any, indent: str = "") -> str:
    """Return JSON with small values on one line each, so that differences are easy to read."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    is_flat = isinstance(value, dict) and not any(isinstance(entry, dict) for entry in value.values())
    most = MAX_LINE if is_flat else 120
    if not isinstance(value, dict | list) or not value or len(line) + len(indent) <= most:
        return line
    deeper = indent + " "
    if isinstance(value, dict):
        parts = [f"{deeper}{json.dumps(key)}: {format_json(entry, deeper)}" for key, entry in value.items()]
    else:
        parts = [deeper + format_json(entry, deeper) for entry in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return f"{opening}\n" + ",\n".join(parts) + f"\n{indent}{closing}"
