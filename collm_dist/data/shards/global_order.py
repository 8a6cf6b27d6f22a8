"""Order of training and evaluation: a function of manifest, seed, epoch and global batch size only.

Shards are permuted, contexts are permuted within a window of neighbouring shards, and their targets are concatenated
and cut every ``global_batch_size`` rows. A context that straddles a cut is split between the two batches. The order is
independent of the number of processes and loader workers, so all processes see the same batches, and a killed run
resumes at its step on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from collm_dist.data.prompts.ragged import to_offsets
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock, IntArray, concatenate_blocks
from collm_dist.data.shards.local_shards import LocalShards
from collm_dist.data.shards.manifest import Manifest, ShardInfo
from collm_dist.data.shards.shard_reader import read_shard
from collm_dist.errors import ArtifactError, DataError
from collm_dist.random_keys import hash_integers

# Shards whose contexts are permuted together. Two windows are in memory, since the next one is read ahead.
WINDOW_SHARDS = 4
# Hash keys of independent draws.
_SHARD_DRAW, _CONTEXT_DRAW = 1, 2


def read_verified(data_dir: Path, shard: ShardInfo, local_shards: LocalShards | None = None) -> ContextBlock:
    """Read a whole shard. Its checksum is verified once per process, and again if the file changes.

    Args:
        data_dir: a run's data folder.
        shard: entry of its manifest.
        local_shards: local copies to read instead; None = read the shard itself.

    Raises:
        ArtifactError: the shard is missing or damaged, or does not match the manifest.
    """
    path = data_dir / shard.path if local_shards is None else local_shards.fetch(shard)
    blocks = list(read_shard(path, shard.sha256))
    block = concatenate_blocks(blocks) if blocks else None
    if block is None or (block.num_contexts, block.num_targets) != (shard.contexts, shard.rows):
        raise ArtifactError(
            f"{path}: the manifest says {shard.contexts} contexts and {shard.rows} rows, the shard has "
            f"{(block.num_contexts, block.num_targets) if block else 'none'}; redo the data step with --force data"
        )
    return block


def slice_targets(block: ContextBlock, start: int, stop: int) -> ContextBlock:
    """Return the block of targets ``start:stop``. Only offsets are copied, so the cost does not depend on the block."""
    first = int(np.searchsorted(block.target_offsets, start, side="right")) - 1
    last = int(np.searchsorted(block.target_offsets, stop, side="left"))
    likes = block.history_offsets[first : last + 1]
    dislikes = block.dislike_offsets[start : stop + 1]
    kept = slice(dislikes[0], dislikes[-1])
    return ContextBlock(
        user_idx=block.user_idx[first:last],
        num_likes=block.num_likes[first:last],
        history_offsets=likes - likes[0],
        history_items=block.history_items[likes[0] : likes[-1]],
        target_offsets=np.clip(block.target_offsets[first : last + 1], start, stop) - start,
        dislike_offsets=dislikes - dislikes[0],
        dislike_items=block.dislike_items[kept],
        likes_since=None if block.likes_since is None else block.likes_since[kept],
        **{name: getattr(block, name)[start:stop] for name in TARGET_FIELDS},
    )


class GlobalOrder:
    """Global batches of one split.

    Attributes:
        num_rows, num_contexts: size of an epoch, after sampling by ``max_contexts`` and ``max_users``.
        global_batch_size: rows per batch; the last batch of an epoch may be smaller.
        num_split_contexts: contexts cut so far by the latest ``iter_batches``.
    """

    def __init__(
        self,
        data_dir: Path,
        manifest: Manifest,
        split: str,
        seed: int,
        global_batch_size: int,
        max_contexts: int | None = None,
        max_users: int | None = None,
        shuffle: bool = True,
        local_shards: LocalShards | None = None,
    ) -> None:
        """Determine the contexts of an epoch; shards are read here only if contexts or users are sampled.

        Args:
            data_dir: a run's data folder.
            manifest: its manifest.
            split: train, valid or test.
            seed: seed of the order and of the sampling.
            global_batch_size: rows per batch.
            max_contexts: keep this many contexts, those with the smallest hash of seed, user and number of likes.
            max_users: keep this many users, those with the smallest hash of seed and user; before ``max_contexts``.
            shuffle: False = the manifest's order in every epoch (evaluation).
            local_shards: local copies to read instead of the shards themselves.

        Raises:
            DataError: the split has no rows.
            ArtifactError: a shard is missing or damaged.
        """
        self._data_dir, self._seed, self._shuffle, self._local_shards = data_dir, seed, shuffle, local_shards
        self.global_batch_size = global_batch_size
        self._shards = [shard for shard in manifest.list_shards(split) if shard.rows > 0]
        if not self._shards:
            raise DataError(f"{data_dir}: the split '{split}' has no rows; check dataset.split and the input's dates")
        self._selected: list[IntArray] | None = None
        self._rows = [shard.rows for shard in self._shards]
        self.num_contexts = sum(shard.contexts for shard in self._shards)
        if max_contexts is not None or max_users is not None:
            self._select_contexts(max_contexts, max_users)
        self.num_rows = sum(self._rows)
        self.num_split_contexts = 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches per epoch."""
        return -(-self.num_rows // self.global_batch_size)

    def iter_batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[ContextBlock]:
        """Yield the global batches of an epoch from ``start_step``; windows that lie entirely before it are not read.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        self.num_split_contexts = 0
        size = self.global_batch_size
        windows = self._plan_windows(epoch)
        ends = np.cumsum([sum(self._rows[shard] for shard in window) for window in windows])
        skipped = int(np.searchsorted(ends, start_step * size, side="right"))
        start = start_step * size - (int(ends[skipped - 1]) if skipped else 0)
        pieces: list[ContextBlock] = []
        missing = size
        for block in self._load_windows(windows[skipped:], epoch):
            cuts = np.arange(start + missing, block.num_targets, size)
            self.num_split_contexts += _count_split(block.target_offsets, cuts)
            for first, last in pairwise([start, *cuts.tolist(), block.num_targets]):
                pieces.append(slice_targets(block, first, last))
                missing -= last - first
                if missing == 0:
                    yield concatenate_blocks(pieces) if len(pieces) > 1 else pieces[0]
                    pieces, missing = [], size
            start = 0
        if pieces:
            yield concatenate_blocks(pieces)

    def _select_contexts(self, max_contexts: int | None, max_users: int | None) -> None:
        """Select the contexts of every shard in one pass over all shards."""
        blocks = (read_verified(self._data_dir, shard, self._local_shards) for shard in self._shards)
        keys = [(block.user_idx, block.num_likes, np.diff(block.target_offsets)) for block in blocks]
        users, likes, rows = (np.concatenate(parts) for parts in zip(*keys, strict=True))
        kept = np.arange(len(users))
        if max_users is not None:
            distinct = np.unique(users)
            smallest = distinct[np.argsort(hash_integers(self._seed, distinct), kind="stable")[:max_users]]
            kept = kept[np.isin(users, smallest)]
        if max_contexts is not None:
            hashes = hash_integers(self._seed, users[kept], likes[kept])
            kept = np.sort(kept[np.argsort(hashes, kind="stable")[:max_contexts]])
        firsts = to_offsets(np.array([len(parts[0]) for parts in keys]))
        shares = [kept[first:last] for first, last in pairwise(np.searchsorted(kept, firsts))]
        self._selected = [share - first for share, first in zip(shares, firsts, strict=False)]
        self._rows = [int(rows[share].sum()) for share in shares]
        self.num_contexts = len(kept)

    def _plan_windows(self, epoch: int) -> list[list[int]]:
        """Return the shard numbers of each window, in order."""
        order = np.arange(len(self._shards))
        if self._shuffle:
            order = np.argsort(hash_integers(self._seed, _SHARD_DRAW, epoch, order), kind="stable")
        numbers = [int(shard) for shard in order if self._rows[shard] > 0]
        size = WINDOW_SHARDS if self._shuffle else 1
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _load_windows(self, windows: Sequence[list[int]], epoch: int) -> Iterator[ContextBlock]:
        """Yield each window's contexts in their final order, while a thread reads the next window."""
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as pool:
            pending = [pool.submit(self._load_window, window, epoch) for window in windows[:1]]
            for number in range(len(windows)):
                block = pending.pop().result()
                pending = [pool.submit(self._load_window, window, epoch) for window in windows[number + 1 : number + 2]]
                yield block

    def _load_window(self, shards: list[int], epoch: int) -> ContextBlock:
        blocks = [read_verified(self._data_dir, self._shards[shard], self._local_shards) for shard in shards]
        block = concatenate_blocks(blocks)
        contexts = np.arange(block.num_contexts)
        if self._selected is not None:
            firsts = to_offsets(np.array([shard_block.num_contexts for shard_block in blocks]))
            contexts = np.concatenate(
                [self._selected[shard] + first for shard, first in zip(shards, firsts, strict=False)]
            )
        if self._shuffle:
            draws = hash_integers(self._seed, _CONTEXT_DRAW, epoch, block.user_idx[contexts], block.num_likes[contexts])
            contexts = contexts[np.argsort(draws, kind="stable")]
        elif len(contexts) == block.num_contexts:
            return block
        return block.take_contexts(contexts)


def _count_split(target_offsets: IntArray, cuts: IntArray) -> int:
    """Return the number of contexts with a cut inside."""
    owners = np.searchsorted(target_offsets, cuts, side="right") - 1
    return len(np.unique(owners[target_offsets[owners] < cuts]))
