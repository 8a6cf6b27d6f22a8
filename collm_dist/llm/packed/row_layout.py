"""Where packed tokens stand in the blocks of rows that attention compares (``row_blocks``).

The places of all blocks lie one after the other. So a layer lays out all its queries by one gather, and its keys and
its values by one each, however many blocks there are: a GPU waits for kernels to be started.

Shapes: m packed tokens in C rows; A tokens ahead of them whose keys rows see, U of them a header's, which all rows see;
Q and K places of queries and of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from collm_dist.llm.packed.row_blocks import Block, Masks, RowSpan
from collm_dist.prompt_batch import Mirrored


@dataclass(frozen=True)
class _RowPlaces:
    """The places of C rows in blocks.

    Attributes:
        num_queries, num_keys: Q and K.
        rows, columns: (m,) in which row each packed token stands, and where in it.
        query_starts, key_starts: (C,) a row's first places.
        own_starts: (C,) the first place of its own keys, behind the header's and the past's.
    """

    num_queries: int
    num_keys: int
    rows: Tensor
    columns: Tensor
    query_starts: Tensor
    key_starts: Tensor
    own_starts: Tensor


@dataclass(frozen=True)
class RowLayout:
    """How packed tokens are laid out, and found again.

    Attributes:
        blocks: in the order of their rows.
        queries: (Q,) which packed token's query stands at each place; any at padding.
        query_places: (m,) where each packed token's query stands.
        keys: (K,) which of the A + m tokens' keys stands at each place; any at padding.
        key_places: (m,) where each packed token's own key stands.
        header_places: (C, U) where the header's keys stand in each row; None where they need no gradient.
        found: (U + m,) where each result stands: the header's own come first, if they are asked for, then the blocks'.
    """

    blocks: list[Block]
    queries: Tensor
    query_places: Tensor
    keys: Tensor
    key_places: Tensor
    header_places: Tensor | None
    found: Tensor


def _place_rows(lengths: Mirrored, spans: list[RowSpan], header: int) -> _RowPlaces:
    """Return where rows of (C,) ``lengths`` stand, each block's ones behind a header and its longest past."""
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
    return _RowPlaces(num_queries, num_keys, rows, columns, *torch.from_numpy(starts).to(rows.device))


@dataclass(frozen=True)
class Past:
    """Keys ahead of the packed tokens that need no gradient: a header's and, after them, those of prefixes.

    Attributes:
        tokens: A.
        lengths: (C,) how many of the prefixes' each row sees.
        starts: (C,) where these begin among the A.
    """

    tokens: int
    lengths: Mirrored
    starts: Tensor


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
    at, device = _place_rows(lengths, spans, header), lengths.tensor.device
    tokens = torch.arange(len(at.rows), device=device)
    ahead, asked = (header, header) if past is None else (past.tokens, 0)
    # Keys of the header, which all rows see, of the past, and the rows' own.
    shared = torch.arange(header, device=device)
    header_places = at.key_starts[:, None] + shared
    key_places = at.own_starts[at.rows] + at.columns
    keys = torch.zeros(at.num_keys, dtype=torch.int64, device=device)
    keys[header_places] = shared
    keys[key_places] = ahead + tokens
    if past is not None:
        seen = past.lengths.list_rows()
        order = torch.arange(len(seen), device=device) - past.lengths.list_starts()[seen]
        keys[at.key_starts[seen] + header + order] = past.starts[seen] + order
    query_places = at.query_starts[at.rows] + at.columns
    queries = torch.zeros(at.num_queries, dtype=torch.int64, device=device)
    queries[query_places] = tokens
    return RowLayout(
        blocks=[
            Block(span.rows.stop - span.rows.start, span.columns, header + span.past + span.columns, mask)
            for span, mask in zip(spans, masks, strict=True)
        ],
        queries=queries,
        query_places=query_places,
        keys=keys,
        key_places=key_places,
        header_places=header_places if past is None and header else None,
        found=torch.cat([torch.arange(asked, device=device), asked + query_places]),
    )
