"""A global batch's way to the processes: token-balanced slices, length-bucketed micro-batches, equal counts for all.

Every process sees the whole global batch and plans for all of them, so nobody has to ask anybody.

A context with many targets is laid out as several rows, since attention compares all tokens of a row with each other,
branches of other targets too. Where the context has a constant prefix that costs next to nothing: rows of one context
in one micro-batch share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from collm_dist.data.collate import TokenCounts
from collm_dist.data.context_block import ContextBlock, IntArray
from collm_dist.errors import ConfigError

# Of a row's tail and branches where the rows of a context share a prefix: beyond it attention between branches, all of
# it masked, costs more than the tail costs again in one row more.
MAX_TREE_TOKENS = 256


@dataclass(frozen=True)
class _Unit:
    """A context with some of its targets: what is never divided further.

    Attributes:
        rows: the targets of each row.
        prefix: tokens that the rows share.
        tree: tokens of the longest row.
    """

    rows: list[IntArray]
    prefix: int
    tree: int

    @property
    def tokens(self) -> int:
        return self.prefix + len(self.rows) * self.tree


def plan_micro_batches(
    block: ContextBlock, counts: TokenCounts, rank: int, world_size: int, max_tokens: int
) -> list[ContextBlock | None]:
    """Return this process's micro-batches of a global batch.

    Args:
        block: the global batch.
        counts: its tokens.
        rank, world_size: of this process.
        max_tokens: most padded tokens of a micro-batch: contexts times the longest prefix, and rows times the longest
            row.

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
    mine: list[ContextBlock | None] = [_take_rows(block, rows) for rows in plans[rank]]
    return mine + [None] * (most - len(mine))


def _take_rows(block: ContextBlock, rows: list[IntArray]) -> ContextBlock:
    """Return a block with one context for each row."""
    taken = block.take_targets(np.concatenate(rows))
    if taken.num_contexts == len(rows):
        return taken
    return taken.cut_where_changed(np.repeat(np.arange(len(rows)), [len(row) for row in rows]))


def _list_units(block: ContextBlock, counts: TokenCounts, max_tokens: int) -> list[_Unit]:
    """Lay contexts out in rows, and cut them between rows where they do not fit."""
    units = []
    for context in range(block.num_contexts):
        prefix, tail = int(counts.prefix[context]), int(counts.tail[context])
        targets = np.arange(block.target_offsets[context], block.target_offsets[context + 1])
        sizes = counts.branch[targets]
        room = max_tokens - prefix - tail
        if (too_long := sizes > room).any():
            target = int(too_long.argmax())
            raise ConfigError(
                f"max_tokens_per_micro_batch={max_tokens}: row {block.row_id[targets[target]]} alone has "
                f"{prefix + tail + sizes[target]} tokens; raise it to at least that, or lower prompt.max_prompt_tokens"
            )
        rows: list[IntArray] = []
        tree = 0
        for row, size in _fill(targets, sizes, min(room, MAX_TREE_TOKENS - tail) if prefix else room):
            if rows and prefix + (len(rows) + 1) * max(tree, tail + size) > max_tokens:
                units.append(_Unit(rows, prefix, tree))
                rows, tree = [], 0
            rows.append(row)
            tree = max(tree, tail + size)
        units.append(_Unit(rows, prefix, tree))
    return units


def _fill(targets: IntArray, sizes: IntArray, room: int) -> Iterator[tuple[IntArray, int]]:
    """Yield runs of targets with their sizes, each as long as there is room, but one target at least."""
    start = used = 0
    for place, size in enumerate(sizes.tolist()):
        if place > start and used + size > room:
            yield targets[start:place], used
            start, used = place, 0
        used += size
    yield targets[start:], used


def _pack(units: list[_Unit], max_tokens: int) -> list[list[IntArray]]:
    """Pack units of similar length into micro-batches and return their rows."""
    batches: list[list[IntArray]] = []
    prefix = tree = contexts = 0
    for unit in sorted(units, key=lambda one: (one.tree, one.prefix, int(one.rows[0][0]))):
        wide_prefix, wide_tree = max(prefix, unit.prefix), max(tree, unit.tree)
        tokens = wide_prefix * (contexts + 1)
        if batches:
            tokens += wide_tree * (len(batches[-1]) + len(unit.rows))
        if not batches or tokens > max_tokens:
            batches.append([])
            prefix = tree = contexts = 0
        batches[-1] += unit.rows
        prefix, tree, contexts = max(prefix, unit.prefix), max(tree, unit.tree), contexts + 1
    return batches
