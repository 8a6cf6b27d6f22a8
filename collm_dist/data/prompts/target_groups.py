"""Groups of targets that a loss compares with each other.

A *list* is a positive and the negatives sampled for it (``ContextBlock.group_id``); any other target is a list of its
own. A *group* consists of whole lists of one context, with at most ``MAX_GROUP_TARGETS`` targets, or of one longer
list. Groups depend on the global batch alone, so a loss within groups is independent of processes and micro-batches.
"""

from __future__ import annotations

import numpy as np

from collm_dist.data.shards.context_block import ContextBlock, IntArray

# All targets of a group are in one micro-batch, so this bounds the tokens that a micro-batch must hold.
MAX_GROUP_TARGETS = 16


def find_groups(block: ContextBlock) -> IntArray:
    """Return the (N,) group of each target: lists in order of appearance, as many as fit.

    Args:
        block: a global batch, with contexts cut at time folds, and after each dislike if the prompts show dislikes.
    """
    groups = np.empty(block.num_targets, dtype=np.int64)
    group = 0
    for context in range(block.num_contexts):
        start, stop = block.target_offsets[context : context + 2]
        _, firsts, lists, sizes = np.unique(
            block.group_id[start:stop], return_index=True, return_inverse=True, return_counts=True
        )
        group_of_list = np.empty(len(firsts), dtype=np.int64)
        used = 0
        for number in np.argsort(firsts).tolist():
            if used and used + sizes[number] > MAX_GROUP_TARGETS:
                group, used = group + 1, 0
            group_of_list[number] = group
            used += int(sizes[number])
        groups[start:stop] = group_of_list[lists]
        group += 1
    return groups


def list_members(groups: IntArray, targets: IntArray) -> list[IntArray]:
    """Return the targets of each group, in order.

    Args:
        groups: (N,) group of each target of a block.
        targets: (M,) positions of targets.
    """
    by_group = targets[np.argsort(groups[targets], kind="stable")]
    return np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1)
