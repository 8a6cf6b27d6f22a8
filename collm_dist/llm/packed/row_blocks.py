"""Which packed rows attention lays out together.

Attention compares all of a block's queries with all of its keys, so a short row beside a long one costs as much as the
long one. Small blocks waste fewer comparisons, but each costs a call: rows stay together while what they waste is less.

Shapes: C rows in all; a block has R of them, T columns, m tokens, P past tokens, K keys: the header's, P + T of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Comparisons that take as long as one more block does, times the numbers of a query in all its heads: measured with 576
# (benchmarks/results/archive/attention_kernels_cpu.json). On a CPU attention is 2.0 to 2.4 times as fast as in one
# block, no slower with a quarter of it or four times as much. A GPU's is reckoned: an
# H100 took 0.27 s, forward and backward, for as many as 1 << 40, and a block costs a layer some ten kernels.
BLOCK_COST = {"cpu": 576 << 13, "cuda": 576 << 20}


@dataclass(frozen=True)
class Masks:
    """What attention adds to its scores, in the layers' precision: 0 or minus infinity.

    Attributes:
        plain: (R, 1, T, K). None = each token sees the header and those before it in its row.
        window: the same for layers that look back no further than a window; None where there are none.
    """

    plain: Tensor | None
    window: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Rows that attention compares together.

    Attributes:
        rows, columns, keys: R, T and K, the header's keys included.
        masks: what is seen.
    """

    rows: int
    columns: int
    keys: int
    masks: Masks


@dataclass(frozen=True)
class RowSpan:
    """Neighbouring rows.

    Attributes:
        rows: which.
        tokens: their packed tokens.
        columns: tokens of the longest row.
        past: tokens of the longest past.
    """

    rows: slice
    tokens: slice
    columns: int
    past: int


def split_rows(lengths: NDArray[np.int64], pasts: NDArray[np.int64], header: int, cost: int) -> list[RowSpan]:
    """Divide rows in their order; the closer that neighbours are in length, the fewer spans.

    Args:
        lengths: (C,) tokens of each row.
        pasts: (C,) tokens that each sees before its own, besides the header.
        header: tokens that all of them see.
        cost: of a span, in comparisons.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    spans, start = [], 0
    columns = past = needed = 0
    for row, (length, before) in enumerate(zip(lengths.tolist(), pasts.tolist(), strict=True)):
        own = length * (header + before + length)
        wider, longer = max(columns, length), max(past, before)
        compared = (row + 1 - start) * wider * (header + longer + wider)
        if row > start and compared - needed - own > cost:
            spans.append(RowSpan(slice(start, row), slice(ends[start], ends[row]), columns, past))
            start, needed, wider, longer = row, 0, length, before
        columns, past, needed = wider, longer, needed + own
    return [*spans, RowSpan(slice(start, len(lengths)), slice(ends[start], ends[-1]), columns, past)]
