"""What workers tell each other. Without a process group there is one worker, and nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def get_rank() -> int:
    """Return this worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Add a tensor up over the workers, in place, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _DifferentiableSum(torch.autograd.Function):
    """Every worker's loss reads the sum, so the gradient of a worker's term is the sum of all workers' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_workers(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_workers(gradients[0].clone(memory_format=torch.contiguous_format))  # others may hold it too


def sum_differentiably(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the workers; gradients flow back to all of them."""
    if get_world_size() == 1:
        return tensor
    summed: Tensor = _DifferentiableSum.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all workers in their order; each may hold another number of them."""
    if get_world_size() == 1:
        return tensor
    sizes = gather_counts(len(tensor), tensor.device)
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Return every worker's number."""
    if get_world_size() == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(one) for one in counts]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of parameters that all workers share.

    Dense ones travel together in one message. Of a sparse one only the rows that a batch has met travel, unless they
    are so many that the whole table is less.
    """
    if get_world_size() == 1:
        return
    dense = [one for one in parameters if one.grad is not None and not one.grad.is_sparse]
    if dense:
        flat = sum_over_workers(torch.cat([one.grad.flatten() for one in dense if one.grad is not None]))
        for one, part in zip(dense, torch.split(flat, [one.numel() for one in dense]), strict=True):
            one.grad = part.view_as(one)
    for one in parameters:
        if one.grad is not None and one.grad.is_sparse:
            one.grad = _sum_sparse(one.grad.coalesce())


def _sum_sparse(gradient: Tensor) -> Tensor:
    """Return the sum over the workers: (R, E) sparse, with the rows that any of them has met."""
    rows, values = gradient.indices()[0], gradient.values()
    sizes = gather_counts(len(rows), rows.device)
    if max(sizes) * get_world_size() < gradient.shape[0]:
        indices, values = gather_rows(rows), gather_rows(values)
    else:
        # A column more says which rows were met: a gradient may be zero by chance.
        table = values.new_zeros(gradient.shape[0], gradient.shape[1] + 1)
        table[rows] = torch.cat([values, values.new_ones(len(values), 1)], dim=1)
        sum_over_workers(table)
        indices = table[:, -1].nonzero().squeeze(1)
        values = table[indices, :-1]
    return torch.sparse_coo_tensor(indices[None], values, gradient.shape).coalesce()
