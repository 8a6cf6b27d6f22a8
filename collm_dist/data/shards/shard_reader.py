"""Reader of shards: one block of contexts per record."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import safetensors.numpy
import webdataset

from collm_dist.data.shards.context_block import OPTIONAL_FIELDS, TARGET_FIELDS, ContextBlock
from collm_dist.errors import ArtifactError
from collm_dist.runs.file_hashes import hash_once

_SUFFIX = "contexts.safetensors"


def decode_block(data: bytes) -> ContextBlock:
    """Return the block in safetensors bytes, widened to int64.

    Raises:
        ValueError: the arrays, their lengths or their offsets are not those of a block.
    """
    try:
        arrays = safetensors.numpy.load(data)
    except KeyError as error:
        raise ValueError(f"arrays of type {error}") from None
    names = {field.name for field in fields(ContextBlock)} - set(OPTIONAL_FIELDS)
    if arrays.keys() - {"likes_since"} != names or any(
        array.ndim != 1 or array.dtype.kind != "i" for array in arrays.values()
    ):
        raise ValueError("the arrays are not those of contexts")
    block = ContextBlock(**{name: array.astype(np.int64) for name, array in arrays.items()})
    sizes = dict.fromkeys(TARGET_FIELDS, block.num_targets) | {"num_likes": block.num_contexts}
    if block.likes_since is not None:
        sizes["likes_since"] = len(block.dislike_items)
    if any(len(arrays[name]) != size for name, size in sizes.items()):
        raise ValueError("arrays of different lengths")
    for offsets, count, size in (
        (block.history_offsets, block.num_contexts, len(block.history_items)),
        (block.target_offsets, block.num_contexts, block.num_targets),
        (block.dislike_offsets, block.num_targets, len(block.dislike_items)),
    ):
        if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise ValueError("offsets out of range")
    return block


def read_shard(path: Path, sha256: str | None = None) -> Iterator[ContextBlock]:
    """Stream a shard's records.

    Args:
        path: the tar file.
        sha256: its checksum from the manifest, verified once per process and again if the file changes; None = do not
            verify.

    Raises:
        ArtifactError: the shard is missing, truncated or altered.
    """
    remedy = "restore it from the copy that it came from, or redo the data step with --force data"
    if not path.is_file():
        raise ArtifactError(f"{path}: the shard is missing or no file; {remedy}")
    try:
        if sha256 is not None and (actual := hash_once(path)) != sha256:
            raise ArtifactError(
                f"{path}: the shard is damaged (SHA-256 {actual[:16]}..., the manifest says {sha256[:16]}...; "
                f"{path.stat().st_size} bytes); {remedy}"
            )
        # Opened here as a path: WebDataset would run a URL that starts with "pipe:" as a command.
        with path.open("rb") as stream:
            source = {"url": str(path), "stream": stream}
            for sample in webdataset.tariterators.tar_file_expander([source], eof_value=None):
                if sample["fname"].endswith(_SUFFIX):
                    yield decode_block(sample["data"])
    except (ValueError, OSError, tarfile.TarError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path}: the shard cannot be read ({error}); {remedy}") from error
