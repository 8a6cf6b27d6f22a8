"""Ranks and collectives. Without a process group there is one rank, and nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collm_dist.errors import CollmError, WorkerLostError

T = TypeVar("T")
# Messages of gloo's plain RuntimeErrors; NCCL raises DistError.
_LOST_PEER = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "Connection refused",
)


def get_rank() -> int:
    """Return this process's rank; before there is a process group, the one that the launcher set."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leave_process_group() -> None:
    """Destroy the process group in good order, so that no peer takes this process for lost.

    A group of one stays: it has no peers, and DeepSpeed cannot make a second one.
    """
    if get_world_size() > 1:
        dist.destroy_process_group()


@contextmanager
def explain_lost_workers(describe_position: Callable[[], str]) -> Iterator[None]:
    """Raise WorkerLostError if a collective fails because a peer has died or does not answer in time.

    Args:
        describe_position: returns the current activity.
    """
    size_before = get_world_size()
    try:
        yield
    except RuntimeError as error:
        size = max(size_before, get_world_size())  # Ray Train may have closed the group meanwhile
        is_collective = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_PEER)
        if size == 1 or not is_collective:
            raise
        raise WorkerLostError(
            f"process {get_rank()} of {size}, {describe_position()}: a peer has died or does not answer "
            f"({str(error).splitlines()[0]}). If the peer could report its error, it is above. Run the same command "
            "again to resume from the last checkpoint"
        ) from error


def wait_for_all() -> None:
    """Wait until every rank is here. Collective."""
    if get_world_size() > 1:
        dist.barrier()


def any_rank(condition: bool) -> bool:
    """Return whether a condition holds on any rank. Collective."""
    if get_world_size() == 1:
        return condition
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def run_on_rank_0(function: Callable[[], T]) -> T:
    """Run a function on rank 0; return its result, or raise its error, on every rank. Collective.

    Args:
        function: returns something that can be pickled.

    Raises:
        CollmError: raised by the function.
    """
    outcome: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = function()
        except CollmError as error:
            error.is_common = True
            outcome[1] = error
    if get_world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, by rank. Collective; values are pickled."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Return every rank's count, by rank. Collective."""
    if get_world_size() == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(value) for value in counts]


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order; their numbers of rows may differ. Collective."""
    if get_world_size() == 1:
        return tensor
    sizes = gather_counts(len(tensor), tensor.device)
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def sum_over_workers(tensor: Tensor) -> Tensor:
    """All-reduce a tensor in place by sum, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """All-reduce the gradients of replicated parameters by sum.

    Dense gradients travel in one message. Of a sparse gradient only the touched rows travel, unless the whole table is
    smaller.
    """
    if get_world_size() == 1:
        return
    dense = [param for param in parameters if param.grad is not None and not param.grad.is_sparse]
    if dense:
        flat = sum_over_workers(torch.cat([param.grad.flatten() for param in dense if param.grad is not None]))
        for param, part in zip(dense, torch.split(flat, [param.numel() for param in dense]), strict=True):
            param.grad = part.view_as(param)
    for param in parameters:
        if param.grad is not None and param.grad.is_sparse:
            param.grad = _sum_sparse(param.grad.coalesce())


def _sum_sparse(gradient: Tensor) -> Tensor:
    """Return the sum over all ranks: (R, E) sparse, with every row that any rank touched."""
    rows, values = gradient.indices()[0], gradient.values()
    sizes = gather_counts(len(rows), rows.device)
    if max(sizes) * get_world_size() < gradient.shape[0]:
        indices, values = gather_rows(rows), gather_rows(values)
    else:
        # An extra column marks the touched rows: a gradient may be zero by chance.
        table = values.new_zeros(gradient.shape[0], gradient.shape[1] + 1)
        table[rows] = torch.cat([values, values.new_ones(len(values), 1)], dim=1)
        sum_over_workers(table)
        indices = table[:, -1].nonzero().squeeze(1)
        values = table[indices, :-1]
    return torch.sparse_coo_tensor(indices[None], values, gradient.shape, check_invariants=False).coalesce()
