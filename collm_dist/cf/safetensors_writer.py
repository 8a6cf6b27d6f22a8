"""Writer of safetensors files through a memory map, for tables larger than memory.

Format: eight bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CODES = {"float32": "F32", "int64": "I64", "bool": "BOOL"}


def create_tensor_file(
    path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, NDArray[Any]]:
    """Create a file of zeros and return a writable memory map of each tensor.

    Args:
        path: of the file.
        shapes: numpy dtype name and shape of each tensor.
        metadata: goes into the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    places, end = {}, 0
    # Widest dtype first, so that every tensor is aligned.
    for name in sorted(shapes, key=lambda name: (-np.dtype(shapes[name][0]).itemsize, name)):
        dtype, shape = shapes[name]
        size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        places[name], end = end, end + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)

    def open_map(name: str) -> NDArray[Any]:
        dtype, shape = shapes[name]
        if 0 in shape:
            return np.zeros(shape, dtype)  # nothing to map
        mapped = np.memmap(path, dtype, "r+", offset=start + places[name], shape=shape or (1,))
        return mapped.reshape(shape) if not shape else mapped

    return {name: open_map(name) for name in shapes}
