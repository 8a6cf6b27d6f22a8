"""Ragged arrays, to lay out whole blocks of prompts without a loop over tokens.

Shapes: R rows, M values in total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray
from collm_dist.random_keys import hash_integers


def to_offsets(lengths: IntArray) -> IntArray:
    """Return (R + 1,) offsets of (R,) lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Ragged:
    """R rows of different lengths: row r is ``values[offsets[r]:offsets[r + 1]]``.

    Attributes:
        offsets: (R + 1,).
        values: (M,).
    """

    offsets: IntArray
    values: IntArray

    @property
    def lengths(self) -> IntArray:
        """(R,) number of values per row."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """(M,) row of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    @property
    def columns(self) -> IntArray:
        """(M,) position of each value in its row."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def take(self, rows: IntArray) -> Ragged:
        """Return these rows, in this order."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = to_offsets(lengths)
        elements = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(offsets, self.values[elements])

    def take_last(self, counts: IntArray) -> Ragged:
        """Return the last values of each row, at most ``counts`` (R,) per row."""
        lengths = np.minimum(self.lengths, counts)
        offsets = to_offsets(lengths)
        elements = np.arange(offsets[-1]) + np.repeat(self.offsets[1:] - lengths - offsets[:-1], lengths)
        return Ragged(offsets, self.values[elements])

    def merge(self, group_offsets: IntArray) -> Ragged:
        """Concatenate neighbouring rows: group g consists of rows ``group_offsets[g]:group_offsets[g + 1]``."""
        return Ragged(self.offsets[group_offsets], self.values)


def repeat_values(values: Sequence[int], mask: NDArray[np.bool_]) -> Ragged:
    """Return rows that hold the same values where the (R,) mask is true, and are empty elsewhere."""
    return Ragged(to_offsets(mask * len(values)), np.tile(np.asarray(values, dtype=np.int64), int(mask.sum())))


def join_columns(parts: Sequence[Ragged], num_rows: int) -> Ragged:
    """Concatenate parts row by row; every part has ``num_rows`` rows."""
    lengths = np.zeros(num_rows, dtype=np.int64)
    starts = []
    for part in parts:
        starts.append(lengths.copy())
        lengths += part.lengths
    offsets = to_offsets(lengths)
    values = np.zeros(offsets[-1], dtype=np.int64)
    for part, start in zip(parts, starts, strict=True):
        values[offsets[part.rows] + start[part.rows] + part.columns] = part.values
    return Ragged(offsets, values)


def hash_rows(ragged: Ragged) -> NDArray[np.uint64]:
    """Return (R,) hashes of the rows' values."""
    hashes = np.zeros(len(ragged.offsets) - 1, dtype=np.uint64)
    np.add.at(hashes, ragged.rows, hash_integers(0, ragged.columns, ragged.values))
    return hashes


def take_distinct(ragged: Ragged, extra_keys: IntArray | None = None) -> tuple[Ragged, NDArray[np.uint64], IntArray]:
    """Return the distinct rows, shortest first, their hashes, and the (R,) number of the distinct row of each row.

    Args:
        ragged: the rows.
        extra_keys: (R,) keys that must be equal as well.
    """
    hashes = hash_rows(ragged)
    if extra_keys is not None:
        hashes = hash_integers(0, hashes, extra_keys)
    _, firsts, numbers = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.lexsort((firsts, ragged.lengths[firsts]))
    kept = firsts[order]
    return ragged.take(kept), hashes[kept], np.argsort(order)[numbers]
