"""Numbers that the slots of a prompt carry, as one input row per target.

Shapes: C contexts, N targets, H history items, X inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.data.prompts.prompt_template import FIELDS
from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock, pad_histories


def list_slots(prompt_text: str) -> frozenset[str]:
    """Return the names of the slots in a prompt, without brackets: UserID, TargetItemID, MatchID, ItemIDList."""
    return frozenset(name.strip("<>") for name, (_, is_slot) in FIELDS.items() if is_slot and name in prompt_text)


@torch.no_grad()
def build_slot_inputs(
    block: ContextBlock, slots: frozenset[str], vectors: SlotVectors | None, history_length: int, shown_length: int
) -> NDArray[np.float32]:
    """Return (N, X): the contents of each target's slots, and the product of user and item vector if both are slots.

    Args:
        block: the rows.
        slots: names from ``list_slots``, at least one.
        vectors: source of user and item vectors; not read for pair slots.
        history_length: maximum number of liked items that the CF model reads.
        shown_length: maximum number of liked items in ItemIDList, whose vectors are averaged.
    """
    contexts, parts = block.target_contexts, []
    if slots & {"UserID", "TargetItemID", "ItemIDList"}:
        assert vectors is not None
        items, times = torch.from_numpy(block.item_idx), torch.from_numpy(block.timestamp)
        by_slot = {}
        if "UserID" in slots:
            history = torch.from_numpy(pad_histories(block, history_length)[contexts])
            by_slot["user"] = vectors.user_vectors(torch.from_numpy(block.user_idx[contexts]), history, items, times)
        if "TargetItemID" in slots:
            by_slot["item"] = vectors.item_vectors(items, times)
        if len(by_slot) == 2:
            by_slot["product"] = by_slot["user"] * by_slot["item"]
        if "ItemIDList" in slots and shown_length:
            shown = torch.from_numpy(pad_histories(block, shown_length)[contexts])
            listed = vectors.item_vectors(shown.reshape(-1), times.repeat_interleave(shown_length))
            listed = listed.view(*shown.shape, -1)
            by_slot["list"] = listed.sum(dim=1) / (shown >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        parts = [values.float().numpy() for values in by_slot.values()]
    if "MatchID" in slots:
        parts.append(compute_pair_features(block))
    return np.concatenate(parts, axis=1).astype(np.float32)
