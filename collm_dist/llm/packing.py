"""From packed tokens, which lie one after the other, to rows of equal length with padding behind them, and back.

Shapes: m packed tokens, R rows, T columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collm_dist.llm.row_blocks import Block


class _Spread(torch.autograd.Function):
    """Some tokens (m, ...) -> all of them (size, ...), zero where there is none. No place occurs twice."""

    @staticmethod
    def forward(ctx: Any, some: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return some.new_zeros(size, *some.shape[1:]).index_copy_(0, places, some)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _LayOut(torch.autograd.Function):
    """Packed (m, ...) -> rows laid end to end, with any token at padding, whose gradient is not looked at."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return packed.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Pack(torch.autograd.Function):
    """Rows laid end to end (size, ...) -> packed (1, m, ...), not a view: a compiled layer would ask of what."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows[None].index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        packed = gradients[0][0]
        return packed.new_zeros(ctx.size, *packed.shape[1:]).index_copy_(0, places, packed), None


def pack(rows: Tensor, places: Tensor | None) -> Tensor:
    """(R, T, ...) -> (1, m, ...)."""
    if places is None:
        return rows.flatten(0, 1)[None]
    return _Pack.apply(rows.flatten(0, 1), places)  # type: ignore[no-untyped-call, no-any-return]


def spread(some: Tensor, places: Tensor, size: int) -> Tensor:
    """(1, m, ...) -> (1, size, ...), zero but at the places."""
    return _Spread.apply(some.squeeze(0), places, size)[None]  # type: ignore[no-untyped-call, no-any-return]


def lay_out(packed: Tensor, block: Block) -> Tensor:
    """(1, m, ...) -> (R, T, ...). At padding stands any token: nobody sees it, and what it sees is left out."""
    rows: Tensor = packed.squeeze(0)
    if block.places is not None:
        rows = _LayOut.apply(rows, block.sources, block.places)  # type: ignore[no-untyped-call]
    return rows.view(*block.is_token.shape, *packed.shape[2:])
