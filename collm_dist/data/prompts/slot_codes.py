"""Slots of prompts that are being laid out: negative codes among the token ids, which end as places and sources.

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
    """Which training slots lose their vector: a share, drawn by hash of seed and epoch."""

    probability: float
    seed: int
    epoch: int


@dataclass(frozen=True)
class PromptTokens:
    """A micro-batch's tokens, those of the prefixes first and then those of the tree, rows laid end to end.

    Attributes:
        codes: (M,) token ids and slot codes.
        contexts: (M,) the context that each belongs to; the first one of those that share a prefix.
        targets: (M,) the target of a branch's token, ``TAIL`` elsewhere.
    """

    codes: IntArray
    contexts: IntArray
    targets: IntArray


def find_slots(
    block: ContextBlock,
    laid: PromptTokens,
    shown: Ragged,
    context_keys: IntArray,
    masking: Masking | None,
    *,
    user_depends_on_target: bool,
) -> dict[str, Any]:
    """Return the slots by kind and ``item_timestamps``, as in ``PromptBatch``.

    Args:
        block: the rows.
        laid: their tokens.
        shown: (C rows) the history items that the prompts show.
        context_keys: (C,) what masks of a context's own slots are drawn by.
        masking: in training only.
        user_depends_on_target: whether each target has a user vector of its own.
    """

    def find(code: int) -> tuple[IntArray, IntArray, IntArray]:
        places = np.flatnonzero(laid.codes == code)
        return places, laid.contexts[places], laid.targets[places]

    users, user_contexts, user_targets = find(USER)
    items, _, item_targets = find(ITEM)
    listed, list_contexts, _ = find(HISTORY)
    pairs, _, pair_targets = find(PAIR)
    # A list's slots stand in a row as its items do; whose list comes first is up to the layout.
    owners = list_contexts[np.sort(np.unique(list_contexts, return_index=True)[1])]
    listed_items = shown.take(owners).values if len(listed) else listed
    item_sources = np.concatenate([block.item_idx[item_targets], listed_items])
    query = user_targets if user_depends_on_target else user_contexts
    # A context's user slot is drawn by the context, so that a cut context is masked alike in both batches.
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
    return Slots(*(torch.from_numpy(np.ascontiguousarray(one)) for one in (places, sources, masked)))
