"""Contexts with their targets as flat arrays: the content of shards and the unit of loading.

A context is a user after a number of likes. It has a history and all rows (targets) that share this state.

Shapes: C contexts, N targets, L history items in total, K dislikes in total.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def _select_ragged(offsets: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Return the new offsets and the element indices of selected rows of a ragged array."""
    lengths = offsets[rows + 1] - offsets[rows]
    new_offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=new_offsets[1:])
    elements = np.arange(new_offsets[-1]) + np.repeat(offsets[rows] - new_offsets[:-1], lengths)
    return new_offsets, elements


@dataclass(frozen=True)
class ContextBlock:
    """C contexts with N targets as dense indices, independent of backbone and prompt.

    Attributes:
        user_idx: (C,) dense user.
        num_likes: (C,) likes of the user so far, over all splits; user_idx and num_likes identify the context.
        history_offsets, history_items: (C + 1,), (L,) liked items so far, oldest first, the last
            ``preprocessing.max_history_length`` of them.
        target_offsets: (C + 1,) the targets of context c are ``target_offsets[c]:target_offsets[c + 1]``.
        item_idx: (N,) dense item.
        label: (N,) 1 = like, 0 = dislike or sampled negative.
        timestamp: (N,) seconds since 1970.
        row_id: (N,) unique id of the row; sampled rows have separate ids.
        group_id: (N,) row id of the positive that a sampled row belongs to; the row's id otherwise.
        sampled: (N,) 1 = sampled negative, 0 = real event.
        user_likes, user_rows, item_likes, item_rows: (N,) real events strictly before the row's timestamp.
        user_in_train, item_in_train: (N,) 1 = occurs in a training row. Warm = both.
        dislike_offsets, dislike_items: (N + 1,), (K,) the last items that the user disliked strictly before, oldest
            first.
        likes_since: (K,) likes of the user between each dislike and the context, which order likes and dislikes. None =
            not stored, since no prompt shows that order.
        text_rows: (C,) rows of the contexts' users in ``user_texts.parquet``, in requests, where users without rows in
            the log have one; -1 = none. None = ``user_idx``.
    """

    user_idx: IntArray
    num_likes: IntArray
    history_offsets: IntArray
    history_items: IntArray
    target_offsets: IntArray
    item_idx: IntArray
    label: IntArray
    timestamp: IntArray
    row_id: IntArray
    group_id: IntArray
    sampled: IntArray
    user_likes: IntArray
    user_rows: IntArray
    item_likes: IntArray
    item_rows: IntArray
    user_in_train: IntArray
    item_in_train: IntArray
    dislike_offsets: IntArray
    dislike_items: IntArray
    likes_since: IntArray | None = None
    text_rows: IntArray | None = None

    @property
    def num_contexts(self) -> int:
        """C."""
        return len(self.user_idx)

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.item_idx)

    @property
    def target_contexts(self) -> IntArray:
        """(N,) context of each target."""
        return np.repeat(np.arange(self.num_contexts), np.diff(self.target_offsets))

    def take_targets(self, targets: IntArray) -> ContextBlock:
        """Return the block of these targets in this order; a context occurs once for each run of its targets.

        Args:
            targets: (M,) positions of targets. Neighbours from the same context share it.
        """
        owner = self.target_contexts[targets]
        return self._take_runs(targets, owner, np.flatnonzero(np.diff(owner, prepend=-1)))

    def cut_where_changed(self, keys: IntArray) -> ContextBlock:
        """Return the same targets, with contexts cut between neighbouring targets whose (N,) keys differ."""
        owner = self.target_contexts
        changed = (np.diff(owner, prepend=-1) != 0) | (np.diff(keys, prepend=keys[:1]) != 0)
        return self._take_runs(np.arange(self.num_targets), owner, np.flatnonzero(changed))

    def _take_runs(self, targets: IntArray, owner: IntArray, starts: IntArray) -> ContextBlock:
        """Return the block of (M,) targets with (M,) contexts, where each run from a start becomes a context."""
        contexts = owner[starts]
        history_offsets, history = _select_ragged(self.history_offsets, contexts)
        dislike_offsets, dislikes = _select_ragged(self.dislike_offsets, targets)
        ragged = {
            "history_offsets": history_offsets,
            "history_items": self.history_items[history],
            "dislike_offsets": dislike_offsets,
            "dislike_items": self.dislike_items[dislikes],
            "target_offsets": np.append(starts, len(targets)),
            "user_idx": self.user_idx[contexts],
            "num_likes": self.num_likes[contexts],
        }
        flat = {name: getattr(self, name)[targets] for name in TARGET_FIELDS}
        return ContextBlock(
            **ragged,
            **flat,
            likes_since=None if self.likes_since is None else self.likes_since[dislikes],
            text_rows=None if self.text_rows is None else self.text_rows[contexts],
        )

    def take_contexts(self, contexts: IntArray) -> ContextBlock:
        """Return the block of these contexts with all their targets, in this order. Neighbours must be distinct."""
        _, targets = _select_ragged(self.target_offsets, contexts)
        return self.take_targets(targets)


TARGET_FIELDS: tuple[str, ...] = (
    "item_idx",
    "label",
    "timestamp",
    "row_id",
    "group_id",
    "sampled",
    "user_likes",
    "user_rows",
    "item_likes",
    "item_rows",
    "user_in_train",
    "item_in_train",
)
# Fields that may be None.
OPTIONAL_FIELDS: tuple[str, ...] = ("likes_since", "text_rows")
OFFSET_FIELDS: tuple[str, ...] = ("history_offsets", "target_offsets", "dislike_offsets")


def concatenate_blocks(blocks: list[ContextBlock]) -> ContextBlock:
    """Concatenate one or more blocks, which have the same fields."""
    arrays: dict[str, IntArray] = {}
    for field in fields(ContextBlock):
        parts = [getattr(block, field.name) for block in blocks]
        if field.name in OPTIONAL_FIELDS and parts[0] is None:
            continue
        if field.name in OFFSET_FIELDS:
            ends = np.cumsum([0] + [part[-1] for part in parts[:-1]])
            arrays[field.name] = np.concatenate(
                [parts[0][:1]] + [part[1:] + end for part, end in zip(parts, ends, strict=True)]
            )
        else:
            arrays[field.name] = np.concatenate(parts)
    return ContextBlock(**arrays)


def build_unknown_users(items: IntArray, targets_each: int) -> ContextBlock:
    """Return targets of unknown users, who have neither likes nor dislikes.

    Args:
        items: (N,) dense items of the targets.
        targets_each: most targets of a context.
    """
    starts, numbers = np.arange(0, len(items), targets_each), np.arange(len(items))
    nothing, zeros = np.zeros(0, dtype=np.int64), np.zeros(len(items), dtype=np.int64)
    return ContextBlock(
        user_idx=np.full(len(starts), -1),
        num_likes=np.zeros_like(starts),
        history_offsets=np.zeros(len(starts) + 1, dtype=np.int64),
        history_items=nothing,
        target_offsets=np.append(starts, len(items)),
        dislike_offsets=np.zeros(len(items) + 1, dtype=np.int64),
        dislike_items=nothing,
        likes_since=nothing,
        **dict.fromkeys(TARGET_FIELDS, zeros) | {"item_idx": items, "row_id": numbers, "group_id": numbers},
    )


def pad_histories(block: ContextBlock, length: int) -> IntArray:
    """Return the last ``length`` liked items of each context as (C, length), right-aligned, -1 = padding."""
    lengths = np.minimum(np.diff(block.history_offsets), length)
    padded = np.full((block.num_contexts, length), -1, dtype=np.int64)
    is_item = np.arange(length) >= length - lengths[:, None]
    positions = block.history_offsets[1:, None] - length + np.arange(length)
    padded[is_item] = block.history_items[positions[is_item]]
    return padded
