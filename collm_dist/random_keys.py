"""Counter-based random numbers: every choice is a pure function of what it is about, never of who makes it when."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def hash_integers(seed: int, *keys: ArrayLike) -> NDArray[np.uint64]:
    """Mix integers into uniform 64-bit hashes (the finaliser of SplitMix64, folded over the keys).

    Args:
        seed: the run's seed, or one derived from it.
        keys: integer arrays or scalars that broadcast together.

    Returns:
        uint64 array of the broadcast shape.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in (seed, *keys):  # the seed is mixed on its own, so that seed + 1 is no shift of the keys by one
            state = state + np.asarray(key).astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def to_unit_interval(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map hashes to floats in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
