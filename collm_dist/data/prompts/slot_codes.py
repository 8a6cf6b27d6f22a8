"""Slots of prompts during layout: negative codes among the token ids, resolved to positions and sources.

Shapes: C contexts, S slots, M tokens of a micro-batch's prefixes and tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from collm_dist.data.prompts.ragged import Ragged
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.prompt_batch import Slots
from collm_dist.random_keys import hash_integers, to_unit_interval

USER, ITEM, PAIR, HISTORY, CONTINUED = -1, -2, -3, -4, -5
SLOT_CODES = {"<UserID>": USER, "<TargetItemID>": ITEM, "<MatchID>": PAIR}


@dataclass(frozen=True)
class Masking:
    """Random masking of slots in training: each slot with ``probability``, by hash of seed, epoch and slot."""

    probability: float
    seed: int
    epoch: int


@dataclass(frozen=True)
class PromptTokens:
    """Packed tokens of a micro-batch: first the prefixes, then the tree rows.

    Attributes:
        codes: (M,) token ids and slot codes.
        contexts: (M,) context of each token; for a shared prefix the first of its contexts.
        targets: (M,) target of a branch token, ``TAIL`` elsewhere.
    """

    codes: IntArray
    contexts: IntArray
    targets: IntArray


def find_slots(
    block: ContextBlock,
    tokens: PromptTokens,
    shown: Ragged,
    context_keys: IntArray,
    masking: Masking | None,
    *,
    user_depends_on_target: bool,
) -> dict[str, Any]:
    """Return the slots by kind and ``item_timestamps``, as in ``PromptBatch``.

    Args:
        block: contexts and targets.
        tokens: their packed tokens.
        shown: (C rows) history items in the prompts.
        context_keys: (C,) hash keys for masking the slots of a context.
        masking: random masking; None outside training.
        user_depends_on_target: whether each target has a separate user vector.
    """

    def find(code: int) -> tuple[IntArray, IntArray, IntArray]:
        places = np.flatnonzero(tokens.codes == code)
        return places, tokens.contexts[places], tokens.targets[places]

    users, user_contexts, user_targets = find(USER)
    items, _, item_targets = find(ITEM)
    listed, list_contexts, _ = find(HISTORY)
    pairs, _, pair_targets = find(PAIR)
    # Slots of a list are in the order of its items; the order of the lists is that of the layout.
    owners = list_contexts[np.sort(np.unique(list_contexts, return_index=True)[1])]
    listed_items = shown.take(owners).values if len(listed) else listed
    item_sources = np.concatenate([block.item_idx[item_targets], listed_items])
    query = user_targets if user_depends_on_target else user_contexts
    # The user slot of a context is masked by the context's key, so that both parts of a cut context agree.
    list_keys = hash_integers(0, block.user_idx[list_contexts], block.num_likes[list_contexts], listed_items)
    user_keys = block.row_id[user_targets] if user_depends_on_target else context_keys[user_contexts]
    item_keys = np.concatenate([block.row_id[item_targets], list_keys.view(np.int64)])
    first_targets = block.target_offsets[list_contexts]
    times = np.concatenate([block.timestamp[item_targets], block.timestamp[first_targets]])
    return {
        "item_timestamps": torch.from_numpy(times),
        "user_slots": _to_slots(users, query, user_keys, masking, USER),
        "item_slots": _to_slots(np.concatenate([items, listed]), item_sources, item_keys, masking, ITEM),
        "pair_slots": _to_slots(pairs, pair_targets, block.row_id[pair_targets], masking, PAIR),
    }


def _to_slots(places: IntArray, sources: IntArray, keys: IntArray, masking: Masking | None, kind: int) -> Slots:
    masked = np.zeros(len(places), dtype=bool)
    if masking is not None and masking.probability > 0:
        masked = to_unit_interval(hash_integers(masking.seed, masking.epoch, kind, keys)) < masking.probability
    return Slots(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (places, sources, masked)))
