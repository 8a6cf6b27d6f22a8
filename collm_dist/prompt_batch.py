"""The tensors of one micro-batch: what data/ renders and llm/ reads, so that neither imports the other.

A context is computed once and shared by all its targets; the *header*, the text that all prompts begin with, once for
all contexts. A context's other tokens come in up to three regions: the *constant prefix* (in training stage 2, what
stands before the first slot; where nothing trains, all of the context), the *context tail* and one *branch* for each
target. Prefix and tree are two padded
matrices; a tree row holds a context's tail, then the branches one after the other, and rows whose prefixes are equal
name the same one. A token sees the header, its row's prefix, the tail before it, and its own branch before it; never
another branch. Position ids say where a token would stand in the plain prompt of its own target.

Shapes: C contexts (rows), U prefixes, P prefix tokens, T tree tokens, N targets, Q user queries, H history items, F
pair features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Where soft tokens go, and where their vectors come from.

    Attributes:
        places: (S,) int64, a slot's first token among the (U * P) of the prefixes and, after them, the (C * T) of the
            tree; a slot covers ``tokens_per_slot`` of them.
        sources: (S,) int64, what the vector is made of: a user query q, a dense item index (-1 = unknown), or a
            target n for pair slots.
        masked: (S,) bool, the vector is replaced by that of an unknown user or item.
    """

    places: Tensor
    sources: Tensor
    masked: Tensor


@dataclass(frozen=True)
class PromptBatch:
    """One micro-batch of C contexts with N targets in all. Integers are int64 unless said otherwise.

    Attributes:
        header_ids: token ids of the header; empty where rows do not differ after it.
        header_key: what the header is known by.
        prefix_ids: (U, P) token ids, right-padded, no two rows alike in tokens and slots; a slot's columns hold any
            valid id. P is 0 where no prefix is split off (stage 1).
        prefix_lengths: (U,) valid tokens of each.
        prefix_keys: (U,) uint64 array on the host, what the prefixes are known by.
        prefix_rows: (C,) the prefix of each context.
        prefix_places: where in the (U * P) columns the valid tokens stand.
        context_keys: (C,) hashes that name the rows' contexts.
        tree_ids: (C, T) token ids, right-padded; a slot's columns hold any valid id.
        tree_branches: (C, T) 0 = context tail, 1.. = target of the row, -1 = padding.
        tree_positions: (C, T) position ids (header and prefix included), 0 at padding.
        tree_places: where in the (C * T) columns the tokens stand that are no padding.
        last_rows, last_cols: (N,) where each target's last token stands in the tree.
        user_slots, item_slots, pair_slots: the slots by kind.
        user_idx: (Q,) dense user of each query, -1 = unknown.
        user_history: (Q, H) dense liked items, oldest first, right-aligned, -1 = padding.
        user_target: (Q,) dense target item, or -1 where the user vector does not depend on it.
        user_timestamps: (Q,) seconds since 1970, as of when the user is described.
        item_timestamps: (S,) the same of each item slot.
        pair_features: (N, F) float32 statistics for pair slots.
        labels: (N,) float32.
        weights: (N,) float32, 1 for real targets, 0 for the filler of an empty micro-batch.
        row_ids: (N,) row ids of the targets.
    """

    header_ids: Tensor
    header_key: int
    prefix_ids: Tensor
    prefix_lengths: Tensor
    prefix_keys: NDArray[np.uint64]
    prefix_rows: Tensor
    prefix_places: Tensor
    context_keys: Tensor
    tree_ids: Tensor
    tree_branches: Tensor
    tree_positions: Tensor
    tree_places: Tensor
    last_rows: Tensor
    last_cols: Tensor
    user_slots: Slots
    item_slots: Slots
    pair_slots: Slots
    user_idx: Tensor
    user_history: Tensor
    user_target: Tensor
    user_timestamps: Tensor
    item_timestamps: Tensor
    pair_features: Tensor
    labels: Tensor
    weights: Tensor
    row_ids: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding left out."""
        return len(self.header_ids) + len(self.prefix_places) + len(self.tree_places)

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the same batch on another device; copies from pinned memory do not block."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PromptBatch:
        """Return the same batch in page-locked host memory, from where copies to a GPU are asynchronous."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


BatchT = TypeVar("BatchT", Slots, PromptBatch)


def _map_tensors(batch: BatchT, function: Callable[[Tensor], Tensor]) -> BatchT:
    """Return the same (nested) dataclass with ``function`` applied to every tensor."""
    mapped: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            value = function(value)
        elif isinstance(value, Slots):
            value = _map_tensors(value, function)
        mapped[field.name] = value
    return type(batch)(**mapped)
