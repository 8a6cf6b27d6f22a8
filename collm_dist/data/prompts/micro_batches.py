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

from collm_dist.data.prompts.prompt_layout import TokenCounts
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.errors import ConfigError

# Of a row's tail and branches where the rows of a context share a prefix: beyond it attention between branches, all of
# it masked, costs more than the tail costs again in one row more; or, without a tail, than a row costs.
MAX_TREE_TOKENS = 256
MAX_TREE_TOKENS_WITHOUT_TAIL = 128


@dataclass(frozen=True)
class _Unit:
    """A context with some of its targets: what is never divided further.

    Attributes:
        rows: the targets of each row.
        sizes: tokens of each row.
        prefix: tokens that the rows share.
    """

    rows: list[IntArray]
    sizes: list[int]
    prefix: int

    @property
    def tokens(self) -> int:
        """Of all rows, and of the prefix."""
        return self.prefix + sum(self.sizes)


def plan_micro_batches(
    block: ContextBlock, counts: TokenCounts, rank: int, world_size: int, max_tokens: int
) -> list[ContextBlock | None]:
    """Return this process's micro-batches of a global batch.

    Args:
        block: the global batch.
        counts: its tokens.
        rank, world_size: of this process.
        max_tokens: most tokens of a micro-batch: the header's, its prefixes' and its rows'.

    Returns:
        The same number on all processes; None where one has less to do than others.

    Raises:
        ConfigError: a single row exceeds ``max_tokens``.
    """
    room = max_tokens - counts.header
    slices: list[list[_Unit]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    # Longest first to whoever has least: within a few percent of the best division.
    for unit in sorted(_list_units(block, counts, room), key=lambda one: -one.tokens):
        least = loads.index(min(loads))
        slices[least].append(unit)
        loads[least] += unit.tokens
    plans = [_pack_evenly(units, room) for units in slices]
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
            target, most = int(too_long.argmax()), counts.header + max_tokens
            raise ConfigError(
                f"max_tokens_per_micro_batch={most}: row {block.row_id[targets[target]]} alone has "
                f"{counts.header + prefix + tail + sizes[target]} tokens; raise it to at least that, or lower "
                "prompt.max_prompt_tokens"
            )
        units.append(_Unit([], [], prefix))
        longest = MAX_TREE_TOKENS - tail if tail else MAX_TREE_TOKENS_WITHOUT_TAIL
        for row, size in _fill(targets, sizes, min(room, longest) if prefix else room):
            if units[-1].rows and units[-1].tokens + tail + size > max_tokens:
                units.append(_Unit([], [], prefix))
            units[-1].rows.append(row)
            units[-1].sizes.append(tail + size)
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


def _pack_evenly(units: list[_Unit], max_tokens: int) -> list[list[IntArray]]:
    """Pack units with prefixes of similar length into as few micro-batches as fit, none of them a small remainder: that
    would read all weights for little."""
    units = sorted(units, key=lambda one: (one.prefix, max(one.sizes), int(one.rows[0][0])))
    fewest = len(_pack(units, max_tokens))
    enough, too_few = max_tokens, 0
    while enough - too_few > max_tokens // 64 + 1:
        tokens = (enough + too_few) // 2
        enough, too_few = (tokens, too_few) if len(_pack(units, tokens)) == fewest else (enough, tokens)
    return _pack(units, enough)


def _pack(units: list[_Unit], max_tokens: int) -> list[list[IntArray]]:
    """Pack units in their order into micro-batches; return their rows by length, as attention lays them out."""
    batches: list[list[tuple[int, IntArray]]] = []
    tokens = 0
    for unit in units:
        if not batches or tokens + unit.tokens > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1] += zip(unit.sizes, unit.rows, strict=True)
        tokens += unit.tokens
    return [[row for _, row in sorted(batch, key=lambda one: one[0])] for batch in batches]
