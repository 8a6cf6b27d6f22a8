"""From packed tokens, which lie one after the other, to the places of rows (``row_layout``), and back.

Each way is one gather, whose gradient is another one: no place that counts occurs twice, but for keys that several rows
or sequences see.

Shapes: m packed tokens, A tokens ahead of them, N places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Copies:
    """Where tokens stand that may stand in several places.

    Attributes:
        places: (n,) those of the first token, then those of the second, and so on.
        starts: (m,) where each token's begin in them.
    """

    places: Tensor
    starts: Tensor


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


class _Collect(torch.autograd.Function):
    """Places (N, ...) -> the tokens that stand there, (m, ...)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        packed = gradients[0]
        return packed.new_zeros(ctx.size, *packed.shape[1:]).index_copy_(0, places, packed), None


class _LayOut(torch.autograd.Function):
    """(m, ...), and all (A + m, ...) -> (N, ...), with any token at padding, whose gradient is not looked at."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        ahead: Tensor | None,
        whole: Tensor,
        sources: Tensor,
        places: Tensor | None,
        starts: Tensor | None,
        shared: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(places, starts, shared)
        return whole.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        places, starts, shared = ctx.saved_tensors
        (rows,), of_ahead = gradients, None
        if shared is not None:
            of_ahead = rows.index_select(0, shared.flatten()).view(*shared.shape, *rows.shape[1:]).sum(0)
        if starts is None:
            of_packed = rows.index_select(0, places)
        else:  # the library's way of adding up rows, with sums in float32
            of_packed = embedding_bag(places, rows.flatten(1), starts, mode="sum").view(-1, *rows.shape[1:])
        return of_packed, of_ahead, None, None, None, None, None


def collect(rows: Tensor, places: Tensor) -> Tensor:
    """(N, ...) -> (m, ...), what stands at the (m,) places."""
    return _Collect.apply(rows, places)  # type: ignore[no-untyped-call, no-any-return]


def spread(some: Tensor, places: Tensor, size: int) -> Tensor:
    """(m, ...) -> (size, ...), zero but at the places."""
    return _Spread.apply(some, places, size)  # type: ignore[no-untyped-call, no-any-return]


def lay_out(
    packed: Tensor,
    sources: Tensor,
    places: Tensor | Copies | None,
    *,
    whole: Tensor | None = None,
    ahead: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """Return what stands where: (m, ...) -> (N, ...).

    Args:
        packed: the tokens.
        sources: (N,) which of the A + m stands at each place; any at padding: nobody sees it, and what it sees is left
            out.
        places: (m,) where each packed one stands, or where its copies do; None where no gradient is asked for.
        whole: (A + m, ...) those ahead and the packed ones; None where there is nothing ahead.
        ahead: (A, ...), if they need a gradient.
        shared: (C, A) where they stand in each of C rows, then.
    """
    whole = (packed if whole is None else whole).detach()
    at, starts = (places.places, places.starts) if isinstance(places, Copies) else (places, None)
    return _LayOut.apply(packed, ahead, whole, sources, at, starts, shared)  # type: ignore[no-untyped-call, no-any-return]
