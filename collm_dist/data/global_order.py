"""The order in which contexts train: a function of the manifest, the seed, the epoch and the batch size, nothing else.

Shards are permuted; a window of neighbouring shards is read, and its contexts are permuted; their targets are laid end
to end and cut every ``global_batch_size`` rows. A context that straddles a cut is split. Neither the number of
processes nor of loader workers appears anywhere, so every process sees the same batches, and a run killed at a step
goes on there on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from collm_dist.data.context_block import ContextBlock, IntArray, concatenate_blocks
from collm_dist.data.hashing import hash_integers
from collm_dist.data.manifest import Manifest
from collm_dist.data.shard_reader import read_shard
from collm_dist.errors import DataError

WINDOW_SHARDS = 4
# Keys that keep draws for different purposes apart.
_SHARD_DRAW, _CONTEXT_DRAW = 1, 2


class GlobalOrder:
    """Batches of one split.

    Attributes:
        num_rows, num_contexts: of an epoch, after selection.
        num_split_contexts: contexts that straddled a cut between batches so far.
        global_batch_size: rows of a batch; an epoch's last one may be smaller.
    """

    def __init__(
        self,
        data_dir: Path,
        manifest: Manifest,
        split: str,
        seed: int,
        global_batch_size: int,
        *,
        max_contexts: int | None = None,
        max_users: int | None = None,
        shuffle: bool = True,
    ) -> None:
        """Prepare; shards are read here only if there is something to select.

        Args:
            data_dir: a run's data folder.
            manifest: its manifest.
            split: train, valid or test.
            seed: of the order and of the selection.
            global_batch_size: rows a batch.
            max_contexts: keep this many contexts, those with the smallest hash of seed, user and number of likes.
            max_users: keep the contexts of this many users, those with the smallest hash of seed and user.
            shuffle: False gives the manifest's order in every epoch (evaluation).

        Raises:
            DataError: the split holds nothing.
        """
        self._data_dir, self._shards, self._seed, self._shuffle = data_dir, manifest.list_shards(split), seed, shuffle
        self._verified: set[str] = set()
        self.num_split_contexts = 0
        self._kept: list[IntArray] | None = None
        self.global_batch_size = global_batch_size
        self._rows = np.array([shard.rows for shard in self._shards], dtype=np.int64)
        self.num_contexts = sum(shard.contexts for shard in self._shards)
        if max_contexts is not None or max_users is not None:
            self._select(max_contexts, max_users)
        self.num_rows = int(self._rows.sum())
        if self.num_rows == 0:
            raise DataError(f"{data_dir}: the split '{split}' holds no rows")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self.num_rows // self.global_batch_size)

    def iter_batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[ContextBlock]:
        """Yield an epoch's batches from a step on; whole windows before it are skipped unread.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        skip = start_step * self.global_batch_size
        rest: list[ContextBlock] = []
        for window in self._list_windows(epoch):
            rows = int(self._rows[window].sum())
            if skip >= rows:
                skip -= rows
                continue
            block = self._read_window(window, epoch)
            if skip:
                block, skip = block.take_targets(np.arange(skip, rows)), 0
            rest.append(block)
            if sum(one.num_targets for one in rest) >= self.global_batch_size:
                block = concatenate_blocks(rest)
                whole = block.num_targets // self.global_batch_size * self.global_batch_size
                for start in range(0, whole, self.global_batch_size):
                    self.num_split_contexts += int(start > 0 and start not in block.target_offsets)
                    yield block.take_targets(np.arange(start, start + self.global_batch_size))
                rest = [block.take_targets(np.arange(whole, block.num_targets))] if whole < block.num_targets else []
        if rest:
            yield concatenate_blocks(rest)

    def _list_windows(self, epoch: int) -> list[IntArray]:
        """Return the windows of an epoch: indices of shards."""
        indices = np.arange(len(self._shards))
        if not self._shuffle:
            return list(indices[:, None])
        indices = indices[np.argsort(hash_integers(self._seed, _SHARD_DRAW, epoch, indices), kind="stable")]
        return [indices[start : start + WINDOW_SHARDS] for start in range(0, len(indices), WINDOW_SHARDS)]

    def _read_window(self, window: IntArray, epoch: int) -> ContextBlock:
        block = concatenate_blocks([self._read(int(shard)) for shard in window])
        if not self._shuffle:
            return block
        draws = hash_integers(self._seed, _CONTEXT_DRAW, epoch, block.user_idx, block.num_likes)
        return block.take_contexts(np.argsort(draws, kind="stable"))

    def _read(self, shard: int) -> ContextBlock:
        info = self._shards[shard]
        sha256 = None if info.path in self._verified else info.sha256
        block = concatenate_blocks(list(read_shard(self._data_dir / info.path, sha256)))
        self._verified.add(info.path)
        return block if self._kept is None else block.take_contexts(self._kept[shard])

    def _select(self, max_contexts: int | None, max_users: int | None) -> None:
        blocks = [self._read(shard) for shard in range(len(self._shards))]
        sizes = [block.num_contexts for block in blocks]
        user_idx = np.concatenate([block.user_idx for block in blocks])
        num_likes = np.concatenate([block.num_likes for block in blocks])
        kept = np.ones(len(user_idx), dtype=bool)
        if max_users is not None:
            users = np.unique(user_idx)
            chosen = users[np.argsort(hash_integers(self._seed, users), kind="stable")[:max_users]]
            kept &= np.isin(user_idx, chosen)
        if max_contexts is not None:
            candidates = np.flatnonzero(kept)
            draws = hash_integers(self._seed, user_idx[candidates], num_likes[candidates])
            kept[:] = False
            kept[candidates[np.argsort(draws, kind="stable")[:max_contexts]]] = True
        parts = np.split(kept, np.cumsum(sizes)[:-1])
        self._kept = [np.flatnonzero(part) for part in parts]
        self._rows = np.array(
            [int(np.diff(block.target_offsets)[part].sum()) for block, part in zip(blocks, parts, strict=True)]
        )
        self.num_contexts = int(kept.sum())
