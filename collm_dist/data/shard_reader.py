"""Reading shards: one block a record, as arrays."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy
import webdataset

from collm_dist.artifacts import compute_file_hash
from collm_dist.data.context_block import ContextBlock
from collm_dist.errors import ArtifactError

_SUFFIX = "contexts.safetensors"


def decode_block(data: bytes) -> ContextBlock:
    """Return the block of safetensors bytes, widened to int64."""
    return ContextBlock(**{name: array.astype(np.int64) for name, array in safetensors.numpy.load(data).items()})


def read_shard(path: Path, sha256: str | None = None) -> Iterator[ContextBlock]:
    """Stream a shard's records.

    Args:
        path: the tar.
        sha256: its checksum from the manifest; None = do not check (again).

    Raises:
        ArtifactError: missing, truncated or altered; the message names the file and the remedy.
    """
    remedy = "restore it from where it was copied from, or redo the data step with --force data"
    if not path.exists():
        raise ArtifactError(f"{path}: the shard is missing; {remedy}")
    if sha256 is not None and (actual := compute_file_hash(path)) != sha256:
        raise ArtifactError(
            f"{path}: the shard is damaged (SHA-256 {actual[:16]}..., the manifest says {sha256[:16]}...; "
            f"{path.stat().st_size} bytes); {remedy}"
        )
    # A literal path, not a URL: WebDataset would run a name that starts with "pipe:" as a command.
    with path.open("rb") as stream:
        try:
            source = {"url": str(path), "stream": stream}
            for sample in webdataset.tariterators.tar_file_expander([source], eof_value=None):
                if sample["fname"].endswith(_SUFFIX):
                    yield decode_block(sample["data"])
        except (ValueError, OSError, tarfile.TarError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{path}: the shard cannot be read ({error}); {remedy}") from error
