"""Gathers and scatters between packed tokens and the cells of a layout (``row_blocks``, ``sequences``).

Each direction is one gather, whose gradient is another gather: no cell that counts occurs twice, except for keys that
several rows or sequences attend to.

Keys and values in cells are not kept for the backward pass but laid out again (``recompute_in_backward``): every row
has its own copy of the prefix that it attends to, and padding. Copying them a second time costs little beside the rest
of the pass.

Shapes: m packed tokens, A earlier tokens before them (a header's, a prefix's), N cells; G key/value heads, W width of a
head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Copies:
    """Cells of tokens that stand in several cells.

    Attributes:
        cells: (n,) cells of the first token, then of the second, and so on.
        starts: (m,) start of each token's cells in them.
    """

    cells: Tensor
    starts: Tensor


class _Scatter(torch.autograd.Function):
    """Some tokens (m, ...) -> all tokens (size, ...), zero elsewhere. No index occurs twice."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return tokens.new_zeros(size, *tokens.shape[1:]).index_copy_(0, index, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index), None, None


class _Gather(torch.autograd.Function):
    """Cells (N, ...) -> the tokens in them (m, ...). No index occurs twice."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = cells.shape[0]
        return cells.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        packed = gradients[0]
        return packed.new_zeros(ctx.size, *packed.shape[1:]).index_copy_(0, index, packed), None


class _LayOut(torch.autograd.Function):
    """(m, ...), and all (A + m, ...) -> (N, ...), with any token at padding, whose gradient is ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        header: Tensor | None,
        whole: Tensor,
        tokens: Tensor,
        cells: Tensor | None,
        starts: Tensor | None,
        header_cells: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(cells, starts, header_cells)
        return whole.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        cells, starts, header_cells = ctx.saved_tensors
        (laid_out,), header_gradient = gradients, None
        if header_cells is not None:
            copies = laid_out.index_select(0, header_cells.flatten())
            header_gradient = copies.view(*header_cells.shape, *laid_out.shape[1:]).sum(0)
        if starts is None:
            packed_gradient = laid_out.index_select(0, cells)
        else:  # PyTorch's sum over groups of rows, in float32
            sums = embedding_bag(cells, laid_out.flatten(1), starts, mode="sum")
            packed_gradient = sums.view(-1, *laid_out.shape[1:])
        return packed_gradient, header_gradient, None, None, None, None, None


def gather(cells: Tensor, index: Tensor) -> Tensor:
    """Return the tokens in some cells: (N, ...), (m,) -> (m, ...)."""
    return _Gather.apply(cells, index)  # type: ignore[no-untyped-call, no-any-return]


def scatter(tokens: Tensor, index: Tensor, size: int) -> Tensor:
    """Return tokens at their index and zeros elsewhere: (m, ...), (m,) -> (size, ...)."""
    return _Scatter.apply(tokens, index, size)  # type: ignore[no-untyped-call, no-any-return]


def lay_out(
    packed: Tensor,
    tokens: Tensor,
    cells: Tensor | Copies | None,
    *,
    whole: Tensor | None = None,
    header: Tensor | None = None,
    header_cells: Tensor | None = None,
) -> Tensor:
    """Return the content of every cell: (m, ...) -> (N, ...).

    Args:
        packed: the packed tokens.
        tokens: (N,) index among the A + m tokens of each cell's token; any at padding, which nothing attends to and
            whose output is left out.
        cells: (m,) cell of each packed token, or the cells of its copies; None where no gradient is needed.
        whole: (A + m, ...) earlier and packed tokens; None if there are no earlier ones.
        header: (U, ...) the header's, if it needs a gradient.
        header_cells: (C, U) its cells in each of C rows, if it needs a gradient.
    """
    whole = (packed if whole is None else whole).detach()
    index, starts = (cells.cells, cells.starts) if isinstance(cells, Copies) else (cells, None)
    return _LayOut.apply(  # type: ignore[no-untyped-call, no-any-return]
        packed, header, whole, tokens, index, starts, header_cells
    )


class RecomputedCells:
    """The source of a layer's keys, or values, in cells."""

    def __init__(self, laid_out: Tensor, parts: tuple[Tensor, ...], tokens: Tensor) -> None:
        """Remember the source.

        Args:
            laid_out: (N, G, W); only its address is kept.
            parts: tensors of (A + m, G, W) tokens in all, one after the other.
            tokens: (N,) index of each cell's token.
        """
        self.storage = laid_out.untyped_storage().data_ptr()
        self._unit, self._parts, self._tokens = laid_out[0].numel(), parts, tokens
        self._whole: Tensor | None = None
        self._num_pending = 0

    def replace(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        """Return a function that lays out a contiguous range of cells again; other views are kept as they are."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(saved.shape, saved.stride(), strict=True))
        first, within = divmod(int(saved.storage_offset()), self._unit)
        if span != saved.numel() or within or span % self._unit:
            return saved
        self._num_pending += 1
        cells = slice(first, first + span // self._unit)
        return functools.partial(self._lay_out, cells, saved.shape, saved.stride())

    def _lay_out(self, cells: slice, shape: torch.Size, stride: Sequence[int]) -> Tensor:
        """Return one block's cells; the parts are joined once for all blocks, which come one after the other."""
        if self._whole is None:
            self._whole = torch.cat(self._parts) if len(self._parts) > 1 else self._parts[0]
        laid_out = self._whole.index_select(0, self._tokens[cells])
        self._num_pending -= 1
        if self._num_pending == 0:
            self._whole = None
        return laid_out.as_strided(shape, stride)


@contextmanager
def recompute_in_backward(*sources: RecomputedCells) -> Iterator[None]:
    """Do not keep tensors in cells for the backward pass of the operations inside; lay them out again there."""
    if not sources:  # hooks of an outer context, such as a checkpoint's, would not be called
        yield
        return
    by_storage = {source.storage: source for source in sources}

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        source = by_storage.get(saved.untyped_storage().data_ptr())
        return saved if source is None else source.replace(saved)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        yield
