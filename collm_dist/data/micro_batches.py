"""A global batch's way to the processes: token-balanced slices, length-bucketed micro-batches, equal counts for all.

Every process sees the whole global batch and plans for all of them, so nobody has to ask anybody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collm_dist.data.collate import TokenCounts
from collm_dist.data.context_block import ContextBlock, IntArray
from collm_dist.errors import ConfigError


@dataclass(frozen=True)
class _Unit:
    """A context with some of its targets: what is never divided further."""

    targets: IntArray
    prefix: int
    tree: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.tree


def plan_micro_batches(
    block: ContextBlock, counts: TokenCounts, rank: int, world_size: int, max_tokens: int
) -> list[ContextBlock | None]:
    """Return this process's micro-batches of a global batch.

    Args:
        block: the global batch.
        counts: its tokens.
        rank, world_size: of this process.
        max_tokens: most padded tokens of a micro-batch: rows times the longest prefix and the longest tree.

    Returns:
        The same number on all processes; None where one has less to do than others.

    Raises:
        ConfigError: a single row exceeds ``max_tokens``.
    """
    slices: list[list[_Unit]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    # Longest first to whoever has least: within a few percent of the best division.
    for unit in sorted(_list_units(block, counts, max_tokens), key=lambda one: -one.tokens):
        least = loads.index(min(loads))
        slices[least].append(unit)
        loads[least] += unit.tokens
    plans = [_pack(units, max_tokens) for units in slices]
    most = max(len(plan) for plan in plans)
    mine: list[ContextBlock | None] = [block.take_targets(targets) for targets in plans[rank]]
    return mine + [None] * (most - len(mine))


def _list_units(block: ContextBlock, counts: TokenCounts, max_tokens: int) -> list[_Unit]:
    """Cut contexts between targets where they do not fit."""
    units = []
    for context in range(block.num_contexts):
        first, last = block.target_offsets[context], block.target_offsets[context + 1]
        prefix, tail = int(counts.prefix[context]), int(counts.tail[context])
        room = max_tokens - prefix - tail
        start, used = first, 0
        for target in range(first, last):
            size = int(counts.branch[target])
            if size > room:
                raise ConfigError(
                    f"max_tokens_per_micro_batch={max_tokens}: row {block.row_id[target]} alone has "
                    f"{prefix + tail + size} tokens; raise it to at least that, or lower prompt.max_prompt_tokens"
                )
            if used + size > room:
                units.append(_Unit(np.arange(start, target), prefix, tail + used))
                start, used = target, 0
            used += size
        units.append(_Unit(np.arange(start, last), prefix, tail + used))
    return units


def _pack(units: list[_Unit], max_tokens: int) -> list[IntArray]:
    """Pack units of similar length into micro-batches and return their targets."""
    batches: list[list[_Unit]] = []
    prefix = tree = 0
    for unit in sorted(units, key=lambda one: (one.tree, one.prefix, int(one.targets[0]))):
        wide = max(prefix, unit.prefix) + max(tree, unit.tree)
        if not batches or wide * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            prefix = tree = 0
        batches[-1].append(unit)
        prefix, tree = max(prefix, unit.prefix), max(tree, unit.tree)
    return [np.concatenate([unit.targets for unit in batch]) for batch in batches]
