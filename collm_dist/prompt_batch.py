"""The tensors of one micro-batch: what data/ renders and llm/ reads, so that neither imports the other.

A context is computed once and shared by all its targets; the *header*, the text that all prompts begin with, once for
all contexts. A context's other tokens come in up to three regions: the *constant prefix* (in training stage 2, what
stands before the first slot; where nothing trains, all of the context), the *context tail* and one *branch* for each
target. Tokens are packed: prefixes are laid end to end, and so are tree rows, each a context's tail and then its
branches one after the other. Rows whose prefixes are equal name the same one. A token sees the header, its row's
prefix, the tail before it, and its own branch before it; never another branch. Position ids say where a token would
stand in the plain prompt of its own target.

Shapes: C contexts (rows), U prefixes, P tokens of all prefixes, M tokens of all tree rows, N targets, Q user queries, H
history items, F pair features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TAIL = -1  # the target of a token that belongs to none


@dataclass(frozen=True)
class Mirrored:
    """A few integers that are wanted as numbers and as a tensor: nobody then has to wait for a device.

    Attributes:
        numbers: (K,) int64 array on the host.
        tensor: (K,) the same.
    """

    numbers: NDArray[np.int64]
    tensor: Tensor

    @classmethod
    def of(cls, numbers: Sequence[int] | NDArray[np.int64], device: torch.device | str = "cpu") -> Mirrored:
        """Return both."""
        array = np.asarray(numbers, dtype=np.int64)
        return cls(array, torch.from_numpy(array).to(device))

    def __len__(self) -> int:
        """Return K."""
        return len(self.numbers)

    def list_rows(self) -> Tensor:
        """Of lengths: return the row of each packed token, (sum of the lengths,) int64."""
        rows = torch.arange(len(self), device=self.tensor.device)
        return rows.repeat_interleave(self.tensor, output_size=int(self.numbers.sum()))

    def list_starts(self) -> Tensor:
        """Of lengths: return where each row begins among the packed tokens, (K,) int64."""
        return self.tensor.cumsum(0) - self.tensor


@dataclass(frozen=True)
class Segments:
    """Runs of packed tokens that see each other and what stands before them: tails and branches, in their order.

    Attributes:
        lengths: (S,) tokens of each.
        rows: (S,) the row that each belongs to.
        tails: (S,) how many tokens of its row's tail each one sees before itself; a tail sees none.
    """

    lengths: Mirrored
    rows: Mirrored
    tails: Mirrored


@dataclass(frozen=True)
class Slots:
    """Where soft tokens go, and where their vectors come from.

    Attributes:
        places: (S,) int64, a slot's first token among the P of the prefixes and, after them, the M of the tree; a slot
            covers ``tokens_per_slot`` of them.
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
        prefix_ids: (P,) token ids of the prefixes, no two of them alike in tokens and slots, shortest first; a slot's
            tokens hold any valid id. P is 0 where no prefix is split off (stage 1).
        prefix_lengths: (U,) tokens of each.
        prefix_keys: (U,) uint64 array on the host, what the prefixes are known by.
        prefix_rows: (C,) the prefix of each row.
        context_keys: (C,) hashes that name the rows' contexts.
        tree_ids: (M,) token ids of the rows; a slot's tokens hold any valid id.
        tree_lengths: (C,) tokens of each row.
        tree_segments: its tails and branches; none is empty.
        tree_targets: (M,) the target n of a branch's token, ``TAIL`` in a tail.
        tree_positions: (M,) position ids (header and prefix included).
        last: (N,) where each target's last token stands among the M.
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
        """Tokens that the model computes."""
        return len(self.header_ids) + len(self.prefix_ids) + len(self.tree_ids)

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the same batch on another device; copies from pinned memory do not block."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PromptBatch:
        """Return the same batch in page-locked host memory, from where copies to a GPU are asynchronous."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


BatchT = TypeVar("BatchT", Mirrored, Segments, Slots, PromptBatch)


def _map_tensors(batch: BatchT, function: Callable[[Tensor], Tensor]) -> BatchT:
    """Return the same (nested) dataclass with ``function`` applied to every tensor."""
    mapped: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            value = function(value)
        elif isinstance(value, Mirrored | Segments | Slots):
            value = _map_tensors(value, function)  # type: ignore[type-var]
        mapped[field.name] = value
    return type(batch)(**mapped)
