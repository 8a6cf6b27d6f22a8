"""Counter-based random numbers: every draw is a pure function of the keys that it is about, not of call order.

So draws do not depend on the number of workers or on how a batch is divided. This module does not import torch until a
``MaskPool`` is built: commands that only look at finished runs start without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def hash_integers(seed: int, *keys: ArrayLike) -> NDArray[np.uint64]:
    """Mix integers into uniform 64-bit hashes: the finaliser of SplitMix64, folded over the keys.

    Args:
        seed: the run's seed, or a seed derived from it.
        keys: integer arrays or scalars that broadcast together.

    Returns:
        uint64 array of the broadcast shape.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in (seed, *keys):  # the seed is mixed by itself, so that seed + 1 does not shift the keys by one
            state = state + np.asarray(key).astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def hash_tensor(keys: Tensor) -> Tensor:
    """Return the int64 hashes of an int64 tensor: ``hash_integers`` of one key, with its bits read as signed.

    torch has no unsigned 64-bit arithmetic: the constants are the same bits as negative numbers, multiplication wraps
    around, and masks make the right shifts logical.
    """
    keys = keys + -0x61C8864680B583EB
    keys = (keys ^ ((keys >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    keys = (keys ^ ((keys >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))


def to_unit_interval(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map hashes to floats in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MaskPool:
    """Dropout masks, each a window of one pool of independent draws.

    Hashing every element would cost more than the layers around it. So the draws are made once, the same in every
    process and every run, and the hash of a row's key selects the window that is the row's mask.

    Attributes:
        probability: of dropping an element.
        num_windows: distinct masks.
        step: distance between the starts of neighbouring windows. A GPU copies windows that start at multiples of 16
            bytes 3 to 8 times as fast as others (measured on an H200).
        kept: (num_windows * step + max_width,) bool draws, True = kept.
    """

    def __init__(self, probability: float, *, num_windows: int, max_width: int, seed: int, step: int = 1) -> None:
        """Make the draws; ``max_width`` is the widest mask that ``take`` may be asked for."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        self.probability, self.num_windows, self.step = probability, num_windows, step
        self.kept = torch.rand(num_windows * step + max_width, generator=generator, device="cpu") >= probability

    def move_to(self, device: torch.device) -> None:
        """Move the draws to a device, in place."""
        self.kept = self.kept.to(device)

    def take(self, windows: Tensor, width: int) -> Tensor:
        """Return the masks of windows: (...,) int64 below ``num_windows`` -> (..., width) bool, True = kept."""
        return self.kept.as_strided((self.num_windows, width), (self.step, 1))[windows]
