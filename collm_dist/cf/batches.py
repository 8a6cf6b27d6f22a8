"""Training rows of the CF models, and their batches.

A context is a user at a number of likes so far. Its targets share the user's vector, so they stay together in a batch
and the vector is computed once. A worker holds only the rows of the users that it owns.

Batches depend only on the data, the seed, the epoch and the batch size. A keyed permutation maps a context's number to
its place in the epoch, so each worker computes the places of its own contexts without knowing the others.

Shapes: N rows, C contexts, U users owned, L likes of those users, B targets of a batch, H history items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.data.samples.pair_features import compute_count_features, compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock, pad_histories
from collm_dist.random_keys import hash_integers

_PERMUTED_AT_ONCE = 1 << 20
_ROUNDS = 4  # Feistel rounds; four make a pseudorandom permutation (Luby and Rackoff, 1988)


@dataclass(frozen=True)
class CfBatch:
    """C contexts with B targets.

    Attributes:
        user_idx: (C,) local user, -1 = unknown.
        history: (C, H) earlier liked items, oldest first, right-aligned, -1 = padding.
        target_contexts: (B,) context of each target, ascending.
        item_idx: (B,) target items, -1 = unknown.
        keys: (C,) non-negative keys of the random draws of each context; None = no random draws (no dropout).
        features: (B, F) as-of statistics of each target (``cf.feedback: all``); None = not used.
    """

    user_idx: Tensor
    history: Tensor
    target_contexts: Tensor
    item_idx: Tensor
    keys: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def from_pairs(cls, user_idx: Tensor, history: Tensor, item_idx: Tensor, features: Tensor | None = None) -> CfBatch:
        """Build a batch from (B,), (B, H), (B,) and (B, F), in which each pair is its own context."""
        contexts = torch.arange(len(user_idx), device=user_idx.device)
        return cls(user_idx, history, contexts, item_idx, features=features)

    @classmethod
    def from_block(cls, block: ContextBlock, history_length: int, device: torch.device | str = "cpu") -> CfBatch:
        """Build a batch from a block, with at most ``history_length`` liked items per context, and with statistics."""
        arrays = (
            block.user_idx,
            pad_histories(block, history_length),
            block.target_contexts,
            block.item_idx,
            compute_pair_features(block),
        )
        users, history, contexts, items, features = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(users, history, contexts, items, features=features)


@dataclass(frozen=True)
class Rows:
    """N rows of the users that a worker owns, sorted by user and time.

    Attributes:
        context_offsets: (C + 1,) the targets of context c are rows ``context_offsets[c]:context_offsets[c + 1]``.
        user_idx: (C,) local user of each context.
        history_ends: (C,) one past the last liked item in ``liked_items``.
        history_counts: (C,) likes so far; a history holds at most the latest ones.
        item_idx: (N,) target items.
        label: (N,) int8, 1 = like, 0 = dislike or sampled negative.
        timestamp: (N,) seconds since 1970.
        liked_items: (L,) liked items of the owned users, sorted by user and time, of all splits.
        slices: (first context, its number over all workers) of each slice of the owned users; see ``number``.
        total_contexts, total_rows: totals over all workers.
        counts: (N, 4) int32: likes and rows of the user, likes and rows of the item, strictly before each row; None
            = not loaded.
    """

    context_offsets: Tensor
    user_idx: Tensor
    history_ends: Tensor
    history_counts: Tensor
    item_idx: Tensor
    label: Tensor
    timestamp: Tensor
    liked_items: Tensor
    slices: tuple[tuple[int, int], ...]
    total_contexts: int
    total_rows: int
    counts: Tensor | None = None

    @property
    def num_contexts(self) -> int:
        """C."""
        return len(self.user_idx)

    @property
    def target_contexts(self) -> Tensor:
        """(N,) context of each row."""
        contexts = torch.arange(self.num_contexts, device=self.user_idx.device)
        return contexts.repeat_interleave(self.context_offsets.diff())

    @property
    def row_users(self) -> Tensor:
        """(N,) local user of each row."""
        return self.user_idx[self.target_contexts]

    def number(self, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the (K,) numbers of contexts over all workers: all contexts in the order of dense users and time."""
        firsts, numbers = np.array(self.slices, dtype=np.int64).reshape(-1, 2).T
        place = np.searchsorted(firsts, contexts, side="right") - 1
        numbered: NDArray[np.int64] = contexts + (numbers - firsts)[place]
        return numbered

    def to(self, device: torch.device) -> Rows:
        """Return a copy on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def take(self, contexts: Tensor, history_length: int) -> tuple[CfBatch, Tensor]:
        """Return contexts as a batch, and the (B,) row numbers of its targets.

        Args:
            contexts: (K,) numbers of the contexts.
            history_length: maximum H.
        """
        starts = self.context_offsets[contexts]
        counts = self.context_offsets[contexts + 1] - starts
        target_contexts = torch.arange(len(contexts), device=contexts.device).repeat_interleave(counts)
        shifts = (starts - counts.cumsum(0) + counts)[target_contexts]
        rows = torch.arange(len(target_contexts), device=contexts.device) + shifts
        batch = CfBatch(
            self.user_idx[contexts].long(),
            self._gather_history(contexts, history_length),
            target_contexts,
            self.item_idx[rows].long(),
            features=None if self.counts is None else compute_features(self.counts[rows]),
        )
        return batch, rows

    def _gather_history(self, contexts: Tensor, length: int) -> Tensor:
        """Return (K, H), where H is the longest history, at most ``length``."""
        if length == 0:
            return contexts.new_empty(len(contexts), 0)
        counts = self.history_counts[contexts].clamp(max=length)
        length = int(counts.max()) if len(counts) else 0
        places = torch.arange(-length, 0, device=contexts.device)
        positions = self.history_ends[contexts, None] + places
        is_item = places >= -counts[:, None]
        if length == 0:
            return positions
        return torch.where(is_item, self.liked_items[positions.clamp(min=0)].long(), -1)


def compute_features(counts: Tensor) -> Tensor:
    """Return the (B, F) features of (B, 4) counts, see ``data.samples.pair_features``."""
    features = compute_count_features(*counts.long().cpu().numpy().T)
    return torch.from_numpy(features).to(counts.device)


def permute(numbers: NDArray[np.int64], total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the images of (K,) numbers under a keyed permutation of ``range(total)``.

    A balanced Feistel network over the next even number of bits; results outside the range are permuted again.
    """
    half = max(1, (max(total - 1, 1).bit_length() + 1) // 2)
    mask = np.int64((1 << half) - 1)
    places = numbers.astype(np.int64)
    pending = np.arange(len(places))
    while len(pending):
        left, right = places[pending] >> half, places[pending] & mask
        for step in range(_ROUNDS):
            mixed = (hash_integers(seed, epoch, step, right) & np.uint64(mask)).astype(np.int64)
            left, right = right, left ^ mixed
        places[pending] = (left << half) | right
        pending = pending[places[pending] >= total]
    return places


def count_batches(rows: Rows, batch_rows: int) -> int:
    """Return the smallest number of batches in which the mean number of rows is at most ``batch_rows``."""
    return -(-rows.total_rows // batch_rows)


def iter_batches(rows: Rows, batch_rows: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the local numbers of a worker's contexts in each batch of an epoch; all workers yield equally many batches.

    Each batch holds an even share of all workers' contexts, so its number of rows varies a little around the mean.

    Args:
        rows: training rows.
        batch_rows: maximum mean number of rows in a batch.
        seed, epoch: keys of the order.
    """
    num_batches = count_batches(rows, batch_rows)
    places = np.empty(rows.num_contexts, dtype=np.int64)
    for first in range(0, len(places), _PERMUTED_AT_ONCE):
        part = places[first : first + _PERMUTED_AT_ONCE]
        part[:] = permute(rows.number(first + np.arange(len(part))), rows.total_contexts, seed, epoch)
    order = np.argsort(places)
    ends = np.searchsorted(places[order], -(-np.arange(num_batches + 1) * rows.total_contexts // num_batches))
    contexts = torch.from_numpy(order).to(rows.user_idx.device)
    for first, last in pairwise(ends):
        yield contexts[first:last]


def build_rows(
    user_idx: NDArray[Any],
    item_idx: NDArray[Any],
    label: NDArray[Any],
    num_likes: NDArray[Any],
    timestamp: NDArray[Any],
    likes: tuple[NDArray[Any], NDArray[Any]],
    counts: NDArray[Any] | None = None,
) -> Rows:
    """Return rows numbered for a single worker; ``user_shards.number_globally`` renumbers them.

    Args:
        user_idx, item_idx, label, num_likes, timestamp: (N,) sorted by local user and time.
        likes: (U + 1,) offsets and (L,) liked items of each user.
        counts: (N, 4), see ``Rows``.
    """
    is_first = np.ones(len(user_idx), dtype=bool)
    is_first[1:] = (user_idx[1:] != user_idx[:-1]) | (num_likes[1:] != num_likes[:-1])
    starts = np.flatnonzero(is_first)
    offsets, items = likes
    return Rows(
        context_offsets=torch.from_numpy(np.append(starts, len(user_idx))),
        user_idx=torch.from_numpy(user_idx[starts].astype(np.int32)),
        history_ends=torch.from_numpy(offsets[user_idx[starts]] + num_likes[starts]),
        history_counts=torch.from_numpy(num_likes[starts].astype(np.int32)),
        item_idx=torch.from_numpy(item_idx.astype(np.int32)),
        label=torch.from_numpy(label.astype(np.int8)),
        timestamp=torch.from_numpy(timestamp),
        liked_items=torch.from_numpy(items.astype(np.int32)),
        slices=((0, 0),),
        total_contexts=len(starts),
        total_rows=len(user_idx),
        counts=None if counts is None else torch.from_numpy(counts.astype(np.int32)),
    )


def take_before(rows: Rows, end: int) -> Rows:
    """Return the rows with a timestamp below ``end``, numbered for a single worker."""
    keep = rows.timestamp < end
    kept_contexts = rows.target_contexts[keep]
    contexts, counts = torch.unique_consecutive(kept_contexts, return_counts=True)
    return replace(
        rows,
        context_offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        user_idx=rows.user_idx[contexts],
        history_ends=rows.history_ends[contexts],
        history_counts=rows.history_counts[contexts],
        item_idx=rows.item_idx[keep],
        label=rows.label[keep],
        timestamp=rows.timestamp[keep],
        counts=None if rows.counts is None else rows.counts[keep],
        slices=((0, 0),),
        total_contexts=len(contexts),
        total_rows=len(kept_contexts),
    )
