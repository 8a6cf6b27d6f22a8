"""Tensors of one micro-batch: the interface between data/, which builds them, and llm/, which reads them.

A context is computed once and shared by all its targets; the *header*, the text that all prompts start with, is
computed once for all contexts. The other tokens of a context form up to three regions: the *constant prefix* (in
training of stage 2 everything before the first slot; without training the whole context), the *context tail*, and one
*branch* per target. Tokens are packed: prefixes are concatenated, and so are tree rows, each a context's tail followed
by its branches. Rows with equal prefixes share one. A token attends to the header, its row's prefix, the preceding
tail, and the preceding tokens of its own branch, never to another branch. Position ids are those of the plain prompt of
the token's target.

Shapes: C contexts (rows), U prefixes, P tokens of all prefixes, M tokens of all tree rows, N targets, T predicted
tokens of titles, Q user queries, H history items, F pair features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TAIL = -1  # target of a token that belongs to a tail or prefix


@dataclass(frozen=True)
class Mirrored:
    """Integers both on the host and as a tensor, so that reading them needs no device synchronization.

    Attributes:
        numbers: (K,) int64 array on the host.
        tensor: (K,) int64 tensor with the same values.
    """

    numbers: NDArray[np.int64]
    tensor: Tensor

    @classmethod
    def of(cls, numbers: Sequence[int] | NDArray[np.int64], device: torch.device | str = "cpu") -> Mirrored:
        """Build the pair from numbers."""
        array = np.asarray(numbers, dtype=np.int64)
        return cls(array, torch.from_numpy(array).to(device))

    def __len__(self) -> int:
        """Return K."""
        return len(self.numbers)

    def list_rows(self) -> Tensor:
        """Return the row of each packed token, (sum of lengths,) int64, if the numbers are row lengths."""
        rows = torch.arange(len(self), device=self.tensor.device)
        return rows.repeat_interleave(self.tensor, output_size=int(self.numbers.sum()))

    def list_starts(self) -> Tensor:
        """Return the first packed token of each row, (K,) int64, if the numbers are row lengths."""
        return self.tensor.cumsum(0) - self.tensor


@dataclass(frozen=True)
class Segments:
    """Tails and branches in packed order: runs of tokens with causal attention among themselves.

    Attributes:
        lengths: (S,) number of tokens.
        rows: (S,) row of each segment.
        tails: (S,) number of tokens of its row's tail that the segment attends to; 0 for a tail.
    """

    lengths: Mirrored
    rows: Mirrored
    tails: Mirrored

    @classmethod
    def build(cls, tails: NDArray[np.int64], branches: NDArray[np.int64], owner: NDArray[np.int64]) -> Segments:
        """Return the segments of tree rows.

        Args:
            tails: (C,) number of tokens of each tail.
            branches: (N,) number of tokens of each branch.
            owner: (N,) row of each branch.
        """
        lengths, rows = np.concatenate([tails, branches]), np.concatenate([np.arange(len(tails)), owner])
        seen = np.concatenate([np.zeros_like(tails), tails[owner]])
        order = np.argsort(rows, kind="stable")  # each row's tail before its branches
        order = order[lengths[order] > 0]
        return cls(Mirrored.of(lengths[order]), Mirrored.of(rows[order]), Mirrored.of(seen[order]))


@dataclass(frozen=True)
class Slots:
    """Positions of soft tokens and the sources of their vectors.

    Attributes:
        places: (S,) int64, position of a slot's first token among the P prefix tokens followed by the M tree tokens; a
            slot covers ``tokens_per_slot`` tokens.
        sources: (S,) int64, source of the vector: a user query q, a dense item index (-1 = unknown), or a target n for
            pair slots.
        masked: (S,) bool, whether the vector is replaced by that of an unknown user or item.
    """

    places: Tensor
    sources: Tensor
    masked: Tensor


@dataclass(frozen=True)
class PromptBatch:
    """A micro-batch of C contexts with N targets in total. Integers are int64 unless noted otherwise.

    Attributes:
        header_ids: token ids of the header; empty if no row differs after it.
        header_key: cache key of the header.
        prefix_ids: (P,) token ids of the prefixes, distinct in tokens and slots, shortest first; slot tokens have an
            arbitrary valid id. P is 0 if no prefix is split off (stage 1).
        prefix_lengths: (U,) number of tokens of each prefix.
        prefix_keys: (U,) uint64 array on the host, cache keys of the prefixes.
        prefix_rows: (C,) prefix of each row.
        context_keys: (C,) hashes of user and likes; rows cut from one context share theirs.
        tree_ids: (M,) token ids of the rows; tokens of slots have an arbitrary valid id.
        tree_lengths: (C,) number of tokens of each row.
        tree_segments: tails and branches of the rows; none is empty.
        tree_targets: (M,) target n of a branch's token, ``TAIL`` in a tail.
        tree_positions: (M,) position ids, including header and prefix.
        last: (N,) position of each target's last token among the M.
        title_places: (T,) positions among the M of the tokens that predict a title's tokens, all but its first, which
            is the quote; the next token is the predicted one. Empty unless titles are scored.
        target_items: (N,) int64 array on the host, dense items of the targets.
        user_slots, item_slots, pair_slots: the slots by kind.
        user_idx: (Q,) dense user of each query, -1 = unknown.
        user_history: (Q, H) dense liked items, oldest first, right-aligned, -1 = padding.
        user_target: (Q,) dense target item, or -1 if the user vector does not depend on it.
        user_timestamps: (Q,) seconds since 1970 as of which the user is described.
        item_timestamps: (S,) the same for each item slot.
        pair_features: (N, F) float32 statistics for pair slots.
        anchors: (N,) float32 anchors of the scores, 0 without an anchor.
        labels: (N,) float32.
        weights: (N,) float32, 1 for real targets, 0 for the filler of an empty micro-batch.
        row_ids: (N,) row ids of the targets.
        lists: (N,) row id of the positive that a sampled negative belongs to; the target's own row id otherwise.
        groups: (N,) targets of the same group may be compared by a loss, and are all in this micro-batch. A group
            consists of whole lists.
    """

    header_ids: Tensor
    header_key: int
    prefix_ids: Tensor
    prefix_lengths: Mirrored
    prefix_keys: NDArray[np.uint64]
    prefix_rows: Mirrored
    context_keys: Tensor
    tree_ids: Tensor
    tree_lengths: Mirrored
    tree_segments: Segments
    tree_targets: Tensor
    tree_positions: Tensor
    last: Tensor
    title_places: Tensor
    target_items: NDArray[np.int64]
    user_slots: Slots
    item_slots: Slots
    pair_slots: Slots
    user_idx: Tensor
    user_history: Tensor
    user_target: Tensor
    user_timestamps: Tensor
    item_timestamps: Tensor
    pair_features: Tensor
    anchors: Tensor
    labels: Tensor
    weights: Tensor
    row_ids: Tensor
    lists: Tensor
    groups: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model computes."""
        return len(self.header_ids) + len(self.prefix_ids) + len(self.tree_ids)

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the batch on another device; copies from pinned memory do not block."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PromptBatch:
        """Return the batch in pinned host memory, from which copies to a GPU are asynchronous."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


BatchT = TypeVar("BatchT", Mirrored, Segments, Slots, PromptBatch)


def _map_tensors(batch: BatchT, function: Callable[[Tensor], Tensor]) -> BatchT:
    """Return a copy of the (nested) dataclass with ``function`` applied to every tensor."""
    mapped: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            value = function(value)
        elif isinstance(value, Mirrored | Segments | Slots):
            value = _map_tensors(value, function)  # type: ignore[type-var]
        mapped[field.name] = value
    return type(batch)(**mapped)
