"""Writer of shards: WebDataset tars with many contexts per member, deterministic to the byte.

Tars are written as webdataset.TarWriter writes them; that class would import PyTorch in every worker.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock
from collm_dist.data.shards.manifest import ShardInfo
from collm_dist.runs.atomic_files import compute_file_hash, open_atomic

# Types on disk, int32 if not listed; all arrays are int64 in memory.
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
    """Return a block as safetensors bytes. Counts, offsets and items take 32 bits if they fit."""
    arrays = {}
    for field in fields(ContextBlock):
        if (values := getattr(block, field.name)) is None:
            continue
        dtype = np.dtype(_NARROW.get(field.name, np.int32))
        if values.dtype != dtype and len(values) and values.max() > np.iinfo(dtype).max:
            dtype = np.dtype(np.int64)
        arrays[field.name] = np.ascontiguousarray(values, dtype)
    return safetensors.numpy.save(arrays)


def _slice_contexts(block: ContextBlock, start: int, stop: int) -> ContextBlock:
    """Return contexts ``start:stop`` as views; ``take_contexts`` would cost time proportional to the whole block."""
    targets = slice(*block.target_offsets[[start, min(stop, block.num_contexts)]])
    offsets = {
        "history": block.history_offsets[start : stop + 1],
        "target": block.target_offsets[start : stop + 1],
        "dislike": block.dislike_offsets[targets.start : targets.stop + 1],
    }
    history, dislikes = (slice(offsets[name][0], offsets[name][-1]) for name in ("history", "dislike"))
    return ContextBlock(
        user_idx=block.user_idx[start:stop],
        num_likes=block.num_likes[start:stop],
        history_items=block.history_items[history],
        dislike_items=block.dislike_items[dislikes],
        likes_since=None if block.likes_since is None else block.likes_since[dislikes],
        **{f"{name}_offsets": values - values[0] for name, values in offsets.items()},
        **{name: getattr(block, name)[targets] for name in TARGET_FIELDS},
    )


def write_shard(data_dir: Path, name: str, split: str, block: ContextBlock, contexts_per_record: int) -> ShardInfo:
    """Write a block to ``shards/<name>``, ``contexts_per_record`` contexts per record; return its manifest entry."""
    path = data_dir / "shards" / name
    with open_atomic(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, start in enumerate(range(0, block.num_contexts, contexts_per_record)):
            record = encode_block(_slice_contexts(block, start, start + contexts_per_record))
            member = tarfile.TarInfo(f"{number:08d}.contexts.safetensors")
            # Fixed time and owner, so that equal samples give equal bytes.
            member.size, member.mode, member.mtime, member.uname, member.gname = len(record), 0o444, 0, "root", "root"
            tar.addfile(member, io.BytesIO(record))
    return ShardInfo(
        path=f"shards/{name}",
        split=split,
        rows=block.num_targets,
        contexts=block.num_contexts,
        bytes=path.stat().st_size,
        sha256=compute_file_hash(path),
    )
