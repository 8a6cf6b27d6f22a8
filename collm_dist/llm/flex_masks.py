"""Who sees whom among packed tokens, for PyTorch's FlexAttention (Dong et al., arXiv 2412.05496).

Its kernels compare tiles of queries with tiles of keys, pass over tiles that are on no list, and ask about each pair in
the others. So packed tokens are compared as they lie: no rows, no padding, no copies of keys that several rows share.

Shapes: Q queries, the last of K keys: U of a header, P of S prefixes, M of C rows. H query heads, G key/value heads, W
width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from collm_dist.prompt_batch import TAIL, Mirrored

TILE = 128
# Groups of keys: the header's is this one, prefixes and rows have numbers of their own above it.
HEADER = 0

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlexMasks:
    """What queries see, and the same in layers that look back no further than a window; None = there are none."""

    plain: BlockMask
    window: BlockMask | None = None


@dataclass(frozen=True)
class Ahead:
    """What stands before the rows.

    Attributes:
        header: U.
        lengths: (S,) tokens of the prefixes.
        rows: (C,) the prefix of each row; None = one each, or there are none.
        asks: whether the header's tokens are among the queries; there are no prefixes then.
    """

    header: int
    lengths: Mirrored
    rows: Mirrored | None = None
    asks: bool = False

    @property
    def tokens(self) -> int:
        """U + P."""
        return self.header + int(self.lengths.numbers.sum())


def build_flex_masks(
    config: Any, lengths: Mirrored, targets: Tensor, positions: Tensor, ahead: Ahead
) -> FlexMasks:
    """Return who sees whom: a token sees the header, its row's prefix, and before it its row's tail and its own branch.

    Args:
        config: the decoder's.
        lengths: (C,) tokens of each row.
        targets, positions: (M,) as in ``PromptBatch``.
        ahead: what stands before the rows.
    """
    device, window = targets.device, getattr(config, "sliding_window", None)
    count, rows, of_prefixes = len(ahead.lengths), lengths.list_rows(), ahead.lengths.list_rows()
    header = torch.full((ahead.header,), HEADER, device=device)
    own = 1 + count + rows
    groups = torch.cat([header, 1 + of_prefixes, own])
    branches = torch.cat([torch.full((ahead.tokens,), TAIL, device=device), targets])
    first = 0 if ahead.asks else ahead.tokens
    prefix = own if count == 0 else 1 + (rows if ahead.rows is None else ahead.rows.tensor[rows])
    if ahead.asks:
        prefix = torch.cat([header, prefix])
    sees = _make_rule(groups, branches, prefix, first)
    tiles = _list_tiles(lengths.numbers, ahead, first)
    sizes = len(groups) - first, len(groups)
    plain = _build(tiles, sees, sizes, device)
    if window is None:
        return FlexMasks(plain)
    inner = torch.arange(len(of_prefixes), device=device) - ahead.lengths.list_starts()[of_prefixes]
    stand = torch.cat([torch.arange(ahead.header, device=device), ahead.header + inner, positions])
    return FlexMasks(plain, _build(tiles, _make_window_rule(sees, stand, first, window), sizes, device))


def _make_rule(groups: Tensor, branches: Tensor, prefix: Tensor, first: int) -> Sees:
    """Return the rule of ``build_flex_masks``.

    Args:
        groups, branches: (K,) of each key.
        prefix: (Q,) the group that a query sees beside its own and the header's.
        first: the key that the first query is.
    """
    # Tensors alone: a number would be compiled in, and small ones are quicker to read.
    groups, branches, prefix = groups.int(), branches.int(), prefix.int()
    own, branch = groups[first:], branches[first:]
    places = torch.arange(first, len(groups), device=groups.device, dtype=torch.int32)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group, target = groups[key], branches[key]
        near = (group == HEADER) | (group == own[query]) | (group == prefix[query])
        return near & ((target == TAIL) | (target == branch[query])) & (key <= places[query])

    return sees


def _make_window_rule(sees: Sees, stand: Tensor, first: int, window: int) -> Sees:
    """Return a rule's part within a window of (K,) position ids."""
    stand = stand.int()
    oldest = stand[first:] - window

    def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (stand[key] > oldest[query])

    return sees_near


def _list_tiles(lengths: NDArray[np.int64], ahead: Ahead, first: int) -> NDArray[np.bool_]:
    """Return which tiles of keys a tile of queries may see any of: (Q / TILE, K / TILE)."""
    ends = ahead.tokens + np.cumsum(lengths)
    queries, keys = int(ends[-1]) - first, int(ends[-1])
    tiles = np.zeros((-(-queries // TILE), -(-keys // TILE)), dtype=np.bool_)
    tiles[:, : -(-ahead.header // TILE)] = True
    prefix_ends = ahead.header + np.cumsum(ahead.lengths.numbers)
    prefixes = np.arange(len(prefix_ends)) if ahead.rows is None else ahead.rows.numbers
    for row, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        asking = _cover(end - length - first, end - first)
        tiles[asking, _cover(end - length, end)] = True
        if len(prefix_ends):
            stop = int(prefix_ends[prefixes[row]])
            tiles[asking, _cover(stop - int(ahead.lengths.numbers[prefixes[row]]), stop)] = True
    latest = first + np.minimum(TILE * np.arange(1, len(tiles) + 1), queries) - 1
    return tiles & (TILE * np.arange(tiles.shape[1]) <= latest[:, None])


def _cover(start: int, end: int) -> slice:
    """Return the tiles that tokens lie in."""
    return slice(start // TILE, -(-end // TILE))


def _build(tiles: NDArray[np.bool_], sees: Sees, sizes: tuple[int, int], device: torch.device) -> BlockMask:
    counts = torch.from_numpy(tiles.sum(axis=1, dtype=np.int32))
    # Those that are seen first, in their order.
    indices = torch.from_numpy(np.argsort(~tiles, axis=1, kind="stable").astype(np.int32))
    mask = BlockMask.from_kv_blocks(
        counts[None, None], indices[None, None], BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=sizes
    )
    return mask.to(device)


def attend_by_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """(1, H, Q, W), (1, G, K, W) twice -> (1, H, Q, W)."""
    is_ours = query.is_cuda and not torch.compiler.is_compiling()  # a compiled layer compiles it with the rest
    attend: Any = _compile() if is_ours else flex_attention
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] > key.shape[1])  # type: ignore[no-any-return]


@functools.cache
def _compile() -> Any:
    return torch.compile(flex_attention, dynamic=True)
