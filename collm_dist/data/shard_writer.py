"""Writing shards: WebDataset tars whose members pack many contexts each. The same input gives the same bytes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import webdataset

from collm_dist.artifacts import compute_file_hash, open_atomic
from collm_dist.data.context_block import ContextBlock
from collm_dist.data.manifest import ShardInfo

# What fits in a byte or in 32 bits on disk; everything is int64 in memory.
_NARROW: dict[str, type[np.signedinteger[Any]]] = {
    "label": np.int8,
    "sampled": np.int8,
    "user_in_train": np.int8,
    "item_in_train": np.int8,
    "timestamp": np.int64,
    "row_id": np.int64,
    "group_id": np.int64,
    "user_idx": np.int64,
}


def encode_block(block: ContextBlock) -> bytes:
    """Return a block as safetensors bytes. Counts, offsets and items take 32 bits."""
    arrays = {}
    for field in fields(ContextBlock):
        values = getattr(block, field.name)
        dtype: type[np.signedinteger[Any]] = _NARROW.get(field.name, np.int32)
        if len(values) and values.max() > np.iinfo(dtype).max:
            dtype = np.int64
        arrays[field.name] = np.ascontiguousarray(values.astype(dtype))
    return safetensors.numpy.save(arrays)


def write_shard(data_dir: Path, name: str, split: str, block: ContextBlock, contexts_per_record: int) -> ShardInfo:
    """Write a block as ``shards/<name>``, in records of the given number of contexts, and return what was written."""
    path = data_dir / "shards" / name
    # Fixed time and owner: tars of the same samples are the same bytes.
    fixed = {"mtime": 0.0, "user": "root", "group": "root", "compress": False, "encoder": False}
    with open_atomic(path, "wb") as file, webdataset.TarWriter(file, **fixed) as writer:
        for number, start in enumerate(range(0, block.num_contexts, contexts_per_record)):
            chosen = np.arange(start, min(start + contexts_per_record, block.num_contexts))
            record = encode_block(block.take_contexts(chosen))
            writer.write({"__key__": f"{number:08d}", "contexts.safetensors": record})
    return ShardInfo(
        path=f"shards/{name}",
        split=split,
        rows=block.num_targets,
        contexts=block.num_contexts,
        bytes=path.stat().st_size,
        sha256=compute_file_hash(path),
    )
