"""Shuffle files between tasks: one file per producer with one part per consumer, so a shuffle needs few files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from collm_dist.runs.atomic_files import open_atomic, write_json

_IPC = pa.ipc.IpcWriteOptions(compression="lz4")


def hash_text(values: Any) -> NDArray[np.uint64]:
    """Return 64-bit hashes of an Arrow string array: SipHash with a fixed key, equal on every machine."""
    encoded = values.dictionary_encode()  # each distinct id is hashed once
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
    hashes: NDArray[np.uint64] = pd.util.hash_array(distinct, categorize=False)[encoded.indices.to_numpy()]
    return hashes


class PartitionWriter:
    """Writer of a shuffle file: every table is split into one record batch per part."""

    def __init__(self, path: Path, schema: Any, num_parts: int) -> None:
        """Open a temporary file beside ``path``; use as a context manager."""
        self._schema, self._num_parts = schema, num_parts
        self._context = open_atomic(path, "wb")

    def __enter__(self) -> PartitionWriter:
        self._file = self._context.__enter__()
        self._writer = pa.ipc.new_file(self._file, self._schema, options=_IPC)
        return self

    def write(self, table: Any, parts: NDArray[np.int64]) -> None:
        """Append rows, each to its part in (N,) ``parts``. The order within a part is kept."""
        ordered = table.cast(self._schema)
        if np.any(parts[1:] < parts[:-1]):
            # numpy sorts 16-bit integers by radix sort, which is faster.
            order = np.argsort(parts.astype(np.uint16) if self._num_parts <= 1 << 16 else parts, kind="stable")
            ordered, parts = ordered.take(pa.array(order)), parts[order]
        ordered = ordered.combine_chunks()
        bounds = np.searchsorted(parts, np.arange(self._num_parts + 1))
        empty = pa.RecordBatch.from_pylist([], schema=self._schema)
        for first, last in itertools.pairwise(bounds):
            batches = ordered.slice(first, last - first).to_batches()
            self._writer.write_batch(batches[0] if batches else empty)

    def __exit__(self, *error: Any) -> None:
        self._writer.close()
        self._context.__exit__(*error)


def read_partition(paths: Sequence[Path], part: int, num_parts: int) -> Any:
    """Return one part of all shuffle files, in the order of the files and of their rows."""
    batches, schema = [], None
    for path in paths:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            schema = reader.schema
            batches += [reader.get_batch(index) for index in range(part, reader.num_record_batches, num_parts)]
    return pa.Table.from_batches(batches, schema).combine_chunks()


def write_table(path: Path, table: Any) -> None:
    """Write an Arrow file atomically."""
    with open_atomic(path, "wb") as file, pa.ipc.new_file(file, table.schema, options=_IPC) as writer:
        writer.write_table(table)


def read_table(path: Path) -> Any:
    """Read a file of ``write_table``."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def finish_task(marker: Path, stats: dict[str, Any]) -> dict[str, Any]:
    """Mark a task as finished: write its statistics for the driver, and return them."""
    write_json(marker, stats)
    return stats


def find_finished(marker: Path, *outputs: Path) -> dict[str, Any] | None:
    """Return a finished task's statistics, or None if its marker is missing or damaged or an output is missing."""
    if not all(path.exists() for path in outputs):
        return None
    try:
        stats = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return stats if isinstance(stats, dict) else None
