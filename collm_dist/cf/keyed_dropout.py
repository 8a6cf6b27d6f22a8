"""Dropout whose masks follow from keys, not from the order of calls: the same on any number of workers and processes.

Shapes: R rows, W numbers a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_POOL_SIZE = 1 << 18
_MULTIPLIER = 0x5851F42D4C957F2D  # of Knuth's MMIX generator


class KeyedDropout(nn.Module):
    """Zeroes numbers with probability p and scales the others by 1 / (1 - p).

    Hashing every number would cost more than the layers around it. So a pool of independent draws is made once, and a
    row takes the window of it that starts where its key says.
    """

    pool: Tensor

    def __init__(self, probability: float, site: int, width: int) -> None:
        """Draw the pool.

        Args:
            probability: p.
            site: number of the place in the model; each has its own pool.
            width: W at most; the pool has room for as many windows.
        """
        super().__init__()
        self.probability, self.site, self.width = probability, site, width
        generator = torch.Generator().manual_seed(site)
        kept = torch.rand(max(_POOL_SIZE, 2 * width), generator=generator) >= probability
        self.register_buffer("pool", kept.float() / (1 - probability), persistent=False)

    def forward(self, values: Tensor, keys: Tensor | None, *, from_end: bool = False) -> Tensor:
        """Drop.

        Args:
            values: (R, ...).
            keys: (R,) non-negative; None = nothing is dropped.
            from_end: lay the windows from the end of the second axis backwards, so that padding on the left of a
                sequence does not shift them.
        """
        if keys is None or self.probability == 0 or len(values) == 0:
            return values
        width = values[0].numel()
        # As many windows whatever the rows' width is, which padding changes: a key has one start.
        windows = self.pool.as_strided((len(self.pool) - self.width, width), (1, 1))
        starts = ((keys + self.site) * _MULTIPLIER >> 24).remainder(len(windows))
        mask = windows[starts].view_as(values)
        return values * (mask.flip(1) if from_end else mask)
