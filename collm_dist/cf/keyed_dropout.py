"""Dropout whose masks follow from keys instead of call order: the same on any number of workers and processes.

Shapes: R rows, W elements of a row.
"""

from __future__ import annotations

from torch import Tensor, nn

from collm_dist.random_keys import MaskPool

_POOL_SIZE = 1 << 18
_MULTIPLIER = 0x5851F42D4C957F2D  # of Knuth's MMIX generator


class KeyedDropout(nn.Module):
    """Zeroes elements with probability p and scales the others by 1 / (1 - p)."""

    def __init__(self, probability: float, site: int, max_width: int) -> None:
        """Draw the pool of masks.

        Args:
            probability: p.
            site: number of the layer in the model; each has its own pool.
            max_width: largest W; the pool has room for as many windows.
        """
        super().__init__()
        self.probability, self.site = probability, site
        num_windows = max(_POOL_SIZE, 2 * max_width) - max_width
        self._masks = MaskPool(probability, num_windows=num_windows, max_width=max_width, seed=site)

    def forward(self, values: Tensor, keys: Tensor | None, *, from_end: bool = False) -> Tensor:
        """Drop elements of each row.

        Args:
            values: (R, ...).
            keys: (R,) non-negative; None drops nothing.
            from_end: lay the masks from the end of the second axis backwards, so that padding on the left of a
                sequence does not shift them.
        """
        if keys is None or self.probability == 0 or len(values) == 0:
            return values
        self._masks.move_to(values.device)
        # The number of windows does not depend on the width of these rows, which padding changes.
        windows = ((keys + self.site) * _MULTIPLIER >> 24).remainder(self._masks.num_windows)
        mask = self._masks.take(windows, values[0].numel()).view_as(values).to(values.dtype) / (1 - self.probability)
        return values * (mask.flip(1) if from_end else mask)
