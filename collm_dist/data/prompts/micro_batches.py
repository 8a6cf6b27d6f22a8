"""Micro-batches of a global batch: token-balanced slices per process, length buckets, equal counts on all processes.

Every process sees the whole global batch and plans for all processes, so no communication is needed.

A context with many targets is split into several rows, since attention within a row is computed between all its tokens,
including masked ones of other branches. With a constant prefix the split is nearly free: rows of one context in one
micro-batch share it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from collm_dist.data.prompts.prompt_layout import TokenCounts
from collm_dist.data.prompts.target_groups import MAX_GROUP_TARGETS, list_members
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.errors import ConfigError

# Limits on tail and branches of a row if the rows of a context share a prefix. Beyond them, masked attention between
# branches costs more than repeating the tail in another row, or, without a tail, than another row.
MAX_TREE_TOKENS = 256
MAX_TREE_TOKENS_WITHOUT_TAIL = 128


@dataclass(frozen=True)
class _Unit:
    """Some targets of one context; a unit stays in one micro-batch.

    Attributes:
        rows: targets of each row.
        sizes: number of tokens of each row.
        prefix: number of tokens of the shared prefix.
    """

    rows: list[IntArray]
    sizes: list[int]
    prefix: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the prefix and all rows."""
        return self.prefix + sum(self.sizes)


def plan_micro_batches(
    block: ContextBlock,
    counts: TokenCounts,
    rank: int,
    world_size: int,
    max_tokens: int,
    groups: IntArray | None = None,
) -> list[ContextBlock | None]:
    """Return the micro-batches of this process.

    Args:
        block: the global batch.
        counts: its token counts.
        rank, world_size: rank of this process, and number of processes.
        max_tokens: maximum tokens per micro-batch, including header and prefixes.
        groups: (N,) groups that stay in one micro-batch each (see ``find_groups``); None = targets are independent.

    Returns:
        Equally many micro-batches on all processes; None pads the list of a process with less work.

    Raises:
        ConfigError: a single row or group exceeds ``max_tokens``.
    """
    room = max_tokens - counts.header
    slices: list[list[_Unit]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    # Longest first to the least loaded process: within a few percent of the optimum.
    for unit in sorted(_list_units(block, counts, room, groups), key=lambda unit: -unit.tokens):
        lightest = loads.index(min(loads))
        slices[lightest].append(unit)
        loads[lightest] += unit.tokens
    plans = [_pack_evenly(units, room) for units in slices]
    num_batches = max(len(plan) for plan in plans)
    batches: list[ContextBlock | None] = [_take_rows(block, rows) for rows in plans[rank]]
    return batches + [None] * (num_batches - len(batches))


def count_longest(block: ContextBlock, counts: TokenCounts, groups: IntArray | None = None) -> int:
    """Return the tokens, including the header, that every micro-batch must hold: those of the longest row, or group.

    Groups of other blocks may be larger than those of this block, so a group counts as if it were full and every
    branch the longest.

    Args:
        block, counts, groups: as for ``plan_micro_batches``.
    """
    if groups is None:
        rows = counts.header + counts.prefix + counts.tail
        return int((rows[block.target_contexts] + counts.branch).max())
    size = max(int(np.unique(groups, return_counts=True)[1].max()), MAX_GROUP_TARGETS)
    sizes = np.full(size, counts.branch.max())
    units = (
        _fill_unit(np.arange(size), sizes, prefix, tail, _get_row_room(prefix, tail))
        for prefix, tail in zip(counts.prefix.tolist(), counts.tail.tolist(), strict=True)
    )
    return counts.header + max(unit.tokens for unit in units)


def _take_rows(block: ContextBlock, rows: list[IntArray]) -> ContextBlock:
    """Return a block with one context per row."""
    taken = block.take_targets(np.concatenate(rows))
    if taken.num_contexts == len(rows):
        return taken
    return taken.cut_where_changed(np.repeat(np.arange(len(rows)), [len(row) for row in rows]))


def _list_units(
    block: ContextBlock, counts: TokenCounts, max_tokens: int, groups: IntArray | None = None
) -> list[_Unit]:
    """Split contexts into rows, and cut them between rows, or between groups, if they exceed ``max_tokens``."""
    units: list[_Unit] = []
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
        row_room = _get_row_room(prefix, tail)
        if groups is None:
            units += _cut_between_rows(_fill_unit(targets, sizes, prefix, tail, min(room, row_room)), max_tokens)
            continue
        first = len(units)
        for members in list_members(groups, targets):
            unit = _fill_unit(members, counts.branch[members], prefix, tail, row_room)
            if unit.tokens > max_tokens:
                most, needed = counts.header + max_tokens, counts.header + unit.tokens
                raise ConfigError(
                    f"max_tokens_per_micro_batch={most}: the {len(members)} targets from row "
                    f"{block.row_id[members[0]]} on, which the loss compares, together have {needed} tokens; raise it "
                    "to at least that, lower prompt.max_prompt_tokens, or unset pairwise_weight and listwise_weight"
                )
            if len(units) > first:  # with the groups before it, if they fit together
                joined = np.concatenate([*units[-1].rows, members])
                together = _fill_unit(joined, counts.branch[joined], prefix, tail, row_room)
                if together.tokens <= max_tokens:
                    units[-1] = together
                    continue
            units.append(unit)
    return units


def _get_row_room(prefix: int, tail: int) -> int:
    """Return the most tokens of a row's branches; unlimited if a further row would repeat the whole context."""
    if prefix == 0:
        return sys.maxsize
    return MAX_TREE_TOKENS - tail if tail else MAX_TREE_TOKENS_WITHOUT_TAIL


def _fill_unit(targets: IntArray, sizes: IntArray, prefix: int, tail: int, room: int) -> _Unit:
    """Return a unit of all targets, in rows with at most ``room`` tokens of branches or a single target."""
    rows = list(_fill(targets, sizes, room))
    return _Unit([row for row, _ in rows], [tail + size for _, size in rows], prefix)


def _cut_between_rows(unit: _Unit, max_tokens: int) -> Iterator[_Unit]:
    """Yield the unit's rows as units of at most ``max_tokens``."""
    part = _Unit([], [], unit.prefix)
    for row, size in zip(unit.rows, unit.sizes, strict=True):
        if part.rows and part.tokens + size > max_tokens:
            yield part
            part = _Unit([], [], unit.prefix)
        part.rows.append(row)
        part.sizes.append(size)
    yield part


def _fill(targets: IntArray, sizes: IntArray, room: int) -> Iterator[tuple[IntArray, int]]:
    """Yield runs of targets with their total sizes, each at most ``room`` tokens or a single target."""
    start = used = 0
    for position, size in enumerate(sizes.tolist()):
        if position > start and used + size > room:
            yield targets[start:position], used
            start, used = position, 0
        used += size
    yield targets[start:], used


def _pack_evenly(units: list[_Unit], max_tokens: int) -> list[list[IntArray]]:
    """Pack units with prefixes of similar length into as few, evenly filled micro-batches as possible.

    A small remainder would read all weights for few tokens.
    """
    units = sorted(units, key=lambda unit: (unit.prefix, max(unit.sizes), int(unit.rows[0][0])))
    fewest = len(_pack(units, max_tokens))
    enough, too_few = max_tokens, 0
    while enough - too_few > max_tokens // 64 + 1:
        tokens = (enough + too_few) // 2
        enough, too_few = (tokens, too_few) if len(_pack(units, tokens)) == fewest else (enough, tokens)
    return _pack(units, enough)


def _pack(units: list[_Unit], max_tokens: int) -> list[list[IntArray]]:
    """Pack units in order into micro-batches, and return the rows of each by length."""
    batches: list[list[tuple[int, IntArray]]] = []
    tokens = 0
    for unit in units:
        if not batches or tokens + unit.tokens > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1] += zip(unit.sizes, unit.rows, strict=True)
        tokens += unit.tokens
    return [[row for _, row in sorted(batch, key=lambda size_and_row: size_and_row[0])] for batch in batches]
