"""Padded blocks: rows of similar length laid out together, each block attended to by one call.

A block attends from all of its queries to all of its keys, so a short row beside a long one costs as much as the long
one. Small blocks waste less on padding, but each costs a call: rows share a block while the waste costs less than
another call.

The cells of all blocks lie one after the other. So a layer lays out all its queries with one gather, and its keys and
values with one each, however many blocks there are: on a GPU the number of kernels counts.

Shapes: C rows in all with m packed tokens; a block has R rows, T columns and K keys a row: the header's, P of a past, T
of the row itself. A earlier tokens, U of them a header's, which all rows attend to. In a layout Q query cells and L key
cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.prompt_batch import Mirrored

# Query-key pairs that take as long as one more block, times the elements of a query in all its heads; measured with 576
# (benchmarks/results/archive/attention_kernels_cpu.json). On a CPU attention is 2.0 to 2.4 times as fast as in one
# block, and no slower with a quarter or four times of this cost. The GPU's is calculated: an H100 took 0.27 s, forward
# and backward, for 1 << 40, and a block adds about ten kernels to a layer.
_BLOCK_COST = {"cpu": 576 << 13, "cuda": 576 << 20}


def get_head_width(config: Any) -> int:
    """Return the width of a decoder's attention heads, of the widest layer if they differ."""
    layers = getattr(config, "per_layer_config", None)
    widths = [getattr(layer, "head_dim", None) for layer in layers] if layers else [getattr(config, "head_dim", None)]
    own: int = config.hidden_size // config.num_attention_heads
    return max(width or own for width in widths)


@dataclass(frozen=True)
class PaddedBlocks:
    """Attention in padded blocks, on any device.

    Attributes:
        cost: of a block, in query-key pairs times the elements of a query; None = as measured for the device. 0 gives
            blocks without padding, a huge cost gives one block.
    """

    cost: int | None = None

    def count_pairs(self, config: Any, device: torch.device) -> int:
        """Return the query-key pairs that a decoder's attention takes as long for as for one more block."""
        heads: int = config.num_attention_heads
        width: int = heads * get_head_width(config)
        cost = _BLOCK_COST.get(device.type, _BLOCK_COST["cuda"]) if self.cost is None else self.cost
        return cost // width


@dataclass(frozen=True)
class Masks:
    """Additive attention masks in the layers' precision: 0 or minus infinity.

    Attributes:
        plain: (R, 1, T, K). None = each token attends to the header and to those before it in its row.
        window: the same for layers with a sliding window; None if there are none.
    """

    plain: Tensor | None
    window: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Rows that one call attends to.

    Attributes:
        rows, columns, keys: R, T and K.
        masks: of its attention.
    """

    rows: int
    columns: int
    keys: int
    masks: Masks


@dataclass(frozen=True)
class RowSpan:
    """Neighbouring rows of one block.

    Attributes:
        rows: their range.
        tokens: the range of their packed tokens.
        columns: tokens of the longest row.
        past: tokens of the longest past.
    """

    rows: slice
    tokens: slice
    columns: int
    past: int


@dataclass(frozen=True)
class Past:
    """Keys of earlier tokens that need no gradient: a header's and then those of prefixes.

    Attributes:
        num_tokens: A.
        lengths: (C,) number of prefix tokens that each row attends to.
        starts: (C,) index of the first of them among the A.
    """

    num_tokens: int
    lengths: Mirrored
    starts: Tensor


@dataclass(frozen=True)
class RowLayout:
    """Cells of packed tokens in padded blocks.

    Attributes:
        blocks: in the order of their rows.
        query_tokens: (Q,) packed token of each query cell; any at padding.
        query_cells: (m,) cell of each packed token's query.
        key_tokens: (L,) token, among the A + m, of each key cell; any at padding.
        key_cells: (m,) cell of each packed token's own key.
        header_cells: (C, U) cells of the header's keys in each row; None where they need no gradient.
        output_cells: (U + m,) cell of each output: the header's own first, if it is packed, then the blocks'.
    """

    blocks: list[Block]
    query_tokens: Tensor
    query_cells: Tensor
    key_tokens: Tensor
    key_cells: Tensor
    header_cells: Tensor | None
    output_cells: Tensor


def split_rows(lengths: NDArray[np.int64], pasts: NDArray[np.int64], header: int, cost: int) -> list[RowSpan]:
    """Divide rows in their order; the closer neighbours are in length, the fewer spans.

    Args:
        lengths: (C,) tokens of each row.
        pasts: (C,) earlier tokens that each row attends to, besides the header.
        header: U.
        cost: of a span, in query-key pairs.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    spans, start = [], 0
    columns = past = needed = 0
    for row, (length, row_past) in enumerate(zip(lengths.tolist(), pasts.tolist(), strict=True)):
        row_needed = length * (header + row_past + length)
        new_columns, new_past = max(columns, length), max(past, row_past)
        computed = (row + 1 - start) * new_columns * (header + new_past + new_columns)
        if row > start and computed - needed - row_needed > cost:
            spans.append(RowSpan(slice(start, row), slice(ends[start], ends[row]), columns, past))
            start, needed, new_columns, new_past = row, 0, length, row_past
        columns, past, needed = new_columns, new_past, needed + row_needed
    return [*spans, RowSpan(slice(start, len(lengths)), slice(ends[start], ends[-1]), columns, past)]


@dataclass(frozen=True)
class _RowCells:
    """Cells of C rows in blocks.

    Attributes:
        num_queries, num_keys: Q and L.
        rows, columns: (m,) row and column of each packed token.
        query_starts, key_starts: (C,) first cells of each row.
        own_starts: (C,) first cell of a row's own keys, after the header's and the past's.
    """

    num_queries: int
    num_keys: int
    rows: Tensor
    columns: Tensor
    query_starts: Tensor
    key_starts: Tensor
    own_starts: Tensor


def _place_rows(lengths: Mirrored, spans: list[RowSpan], header: int) -> _RowCells:
    """Return the cells of rows of (C,) ``lengths``, each after the header and the longest past of its block."""
    starts = np.zeros((3, len(lengths)), dtype=np.int64)
    num_queries = num_keys = 0
    for span in spans:
        count, keys = span.rows.stop - span.rows.start, header + span.past + span.columns
        order = np.arange(count)
        starts[0, span.rows] = num_queries + order * span.columns
        starts[1, span.rows] = num_keys + order * keys
        starts[2, span.rows] = starts[1, span.rows] + header + span.past
        num_queries, num_keys = num_queries + count * span.columns, num_keys + count * keys
    rows = lengths.list_rows()
    columns = torch.arange(len(rows), device=rows.device) - lengths.list_starts()[rows]
    return _RowCells(num_queries, num_keys, rows, columns, *torch.from_numpy(starts).to(rows.device))


def lay_out_rows(
    lengths: Mirrored,
    spans: list[RowSpan],
    masks: list[Masks],
    header: int,
    past: Past | None = None,
) -> RowLayout:
    """Return the layout of C rows.

    Args:
        lengths: (C,) tokens of each.
        spans, masks: of each block.
        header: U.
        past: None = the header, if there is one, is packed itself, before the rows.
    """
    cells, device = _place_rows(lengths, spans, header), lengths.tensor.device
    packed = torch.arange(len(cells.rows), device=device)
    num_earlier, num_header_outputs = (header, header) if past is None else (past.num_tokens, 0)
    # Keys of the header, of the past, and of the rows themselves.
    header_tokens = torch.arange(header, device=device)
    header_cells = cells.key_starts[:, None] + header_tokens
    key_cells = cells.own_starts[cells.rows] + cells.columns
    key_tokens = torch.zeros(cells.num_keys, dtype=torch.int64, device=device)
    key_tokens[header_cells] = header_tokens
    key_tokens[key_cells] = num_earlier + packed
    if past is not None:
        past_rows = past.lengths.list_rows()
        order = torch.arange(len(past_rows), device=device) - past.lengths.list_starts()[past_rows]
        key_tokens[cells.key_starts[past_rows] + header + order] = past.starts[past_rows] + order
    query_cells = cells.query_starts[cells.rows] + cells.columns
    query_tokens = torch.zeros(cells.num_queries, dtype=torch.int64, device=device)
    query_tokens[query_cells] = packed
    return RowLayout(
        blocks=[
            Block(span.rows.stop - span.rows.start, span.columns, header + span.past + span.columns, mask)
            for span, mask in zip(spans, masks, strict=True)
        ],
        query_tokens=query_tokens,
        query_cells=query_cells,
        key_tokens=key_tokens,
        key_cells=key_cells,
        header_cells=header_cells if past is None and header else None,
        output_cells=torch.cat([torch.arange(num_header_outputs, device=device), num_header_outputs + query_cells]),
    )
