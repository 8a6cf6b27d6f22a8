"""Shards on a local disk: copied once per machine, named by checksum, verified before use."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from collm_dist.config import Config
from collm_dist.data.shards.manifest import ShardInfo
from collm_dist.errors import ArtifactError, CollmError, DiskError
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.file_hashes import hash_once, read_state
from collm_dist.runs.run_dir import normalize
from collm_dist.storage import join_uri, open_filesystem

_BLOCK_BYTES = 8 << 20


def build_local_shards(config: Config, data_dir: Path) -> LocalShards | None:
    """Return this machine's local copies, or None if ``cluster.local_scratch`` is not set."""
    if config.cluster.local_scratch is None:
        return None
    published = config.run.publish_to and join_uri(config.run.publish_to, normalize(Path(config.run.dir)).name, "data")
    return LocalShards(Path(config.cluster.local_scratch).expanduser(), data_dir, published)


class LocalShards:
    """Local copies of shards, named by checksum and shared by all runs and processes of a machine."""

    def __init__(self, folder: Path, data_dir: Path, published: str | None = None) -> None:
        """Set the folders; shards are copied on demand.

        Args:
            folder: folder on a local disk.
            data_dir: the run's data folder.
            published: URI of a published copy of it, for shards that are missing or damaged there.
        """
        self._folder, self._data_dir, self._published = folder, data_dir, published
        self._verified: set[tuple[Path | int, ...]] = set()

    def fetch(self, shard: ShardInfo) -> Path:
        """Return the path of a shard's verified copy. One process copies while the others wait.

        Raises:
            ArtifactError: the shard is missing or damaged in all places.
            DiskError: the disk is full, or writing is not allowed.
            LaunchError: an object store is unreachable or denies access.
        """
        path = self._folder / f"{shard.sha256}.tar"
        if path.exists() and (path, *read_state(path)) in self._verified:
            return path
        with self._explain(shard), self._lock():
            if not path.exists() or hash_once(path) != shard.sha256:
                self._copy(shard, path)
            self._verified.add((path, *read_state(path)))
        return path

    @contextmanager
    def _explain(self, shard: ShardInfo) -> Iterator[None]:
        try:
            yield
        except (OSError, DiskError) as error:
            raise DiskError(
                f"cluster.local_scratch: {self._folder} cannot take {shard.path} ({shard.bytes / 2**20:,.1f} MiB): "
                f"{error}; remove copies of other runs there (*.tar), or set it to another folder or to none"
            ) from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process ends
            yield

    def _copy(self, shard: ShardInfo, path: Path) -> None:
        for partial in self._folder.glob(".*.tmp"):  # from killed processes: the lock excludes running copies
            partial.unlink()
        path.unlink(missing_ok=True)
        if (free := shutil.disk_usage(self._folder).free) < shard.bytes:
            raise OSError(f"{free / 2**20:,.1f} MiB free")
        origin, failure = self._data_dir / shard.path, "is missing"
        if origin.exists():
            try:
                with origin.open("rb") as source:
                    _copy_verified(source, path, shard)
                return
            except ArtifactError as error:
                failure = str(error)
        if self._published is None:
            raise ArtifactError(f"{origin}: {failure}; restore it from the copy that it came from, or redo the data "
                                "step with --force data")  # fmt: skip
        self._fetch_published(shard, path, f"{origin}: {failure}")

    def _fetch_published(self, shard: ShardInfo, path: Path, before: str) -> None:
        uri = join_uri(str(self._published), shard.path)
        try:
            filesystem, place = open_filesystem(uri, "run.publish_to")
            with filesystem.open_input_stream(place) as source:
                _copy_verified(source, path, shard)
        except (CollmError, pa.ArrowException, OSError) as error:
            raise ArtifactError(
                f"{before}; fetching it from {uri} failed as well: {error}; redo the data step with --force data"
            ) from error


def _copy_verified(source: IO[bytes] | Any, path: Path, shard: ShardInfo) -> None:
    """Write the bytes of a stream to ``path`` and verify the shard's checksum.

    Raises:
        ArtifactError: the checksum differs.
    """
    digest, size = hashlib.sha256(), 0
    with open_atomic(path, "wb", shard.bytes) as file:
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
            size += file.write(block)
        if digest.hexdigest() != shard.sha256:
            raise ArtifactError(
                f"the shard is damaged (SHA-256 {digest.hexdigest()[:16]}..., the manifest says "
                f"{shard.sha256[:16]}...; {size} bytes)"
            )
