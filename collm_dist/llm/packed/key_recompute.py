"""Keys and values that are laid out in rows are not kept for the backward pass, but laid out there again.

Each row has a copy of its own of the prefix that it sees, and padding. Laying them out again copies as much once more,
which is little beside what is computed.

Shapes: A tokens ahead of the m packed ones; N places; G key/value heads, W width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recomputed:
    """A layer's keys, or its values: what they were laid out from."""

    def __init__(self, laid: Tensor, parts: tuple[Tensor, ...], sources: Tensor) -> None:
        """Remember.

        Args:
            laid: (N, G, W), not held.
            parts: (A + m, G, W) in all, one after the other.
            sources: (N,) which of the A + m stands at each place.
        """
        self.storage = laid.untyped_storage().data_ptr()
        self._unit, self._parts, self._sources = laid[0].numel(), parts, sources
        self._whole: Tensor | None = None
        self._waiting = 0

    def replace(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        """Return what makes a block's part of what was laid out again; other views are kept as they are."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(saved.shape, saved.stride(), strict=True))
        first, within = divmod(int(saved.storage_offset()), self._unit)
        if span != saved.numel() or within or span % self._unit:
            return saved
        self._waiting += 1
        places = slice(first, first + span // self._unit)
        return functools.partial(self._lay_out, places, saved.shape, saved.stride())

    def _lay_out(self, places: slice, shape: torch.Size, stride: Sequence[int]) -> Tensor:
        """Return one block's part; the parts are joined once for all blocks, which come one after the other."""
        if self._whole is None:
            self._whole = torch.cat(self._parts) if len(self._parts) > 1 else self._parts[0]
        laid = self._whole.index_select(0, self._sources[places])
        self._waiting -= 1
        if self._waiting == 0:
            self._whole = None
        return laid.as_strided(shape, stride)


@contextmanager
def recompute_in_backward(*laid: Recomputed) -> Iterator[None]:
    """Keep none of what was laid out for the backward pass of what is computed here."""
    if not laid:  # hooks that are there already would not be asked
        yield
        return
    by_storage = {one.storage: one for one in laid}

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        one = by_storage.get(saved.untyped_storage().data_ptr())
        return saved if one is None else one.replace(saved)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        yield
