"""Limits of a CF model's batch: the least work that it needs, at the rates that this machine reaches in the same run.

mf: bytes. Weights and both moments of every distinct table row are read once and written once, in random order.
lightgcn: bytes. For every edge of the graph, layer and direction of the step (forward, backward) a row is read, in
random order; weights, gradient and both moments of all rows are streamed once by Adam. This is an estimate and not a
limit: rows of popular items stay in the cache, so large graphs take less.
sasrec, din: operations of the matmuls, forward and backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from collm_dist.cf.batches import Rows
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.models.lightgcn import LightGcn

COPIED_FLOATS, GATHERED_ROWS, MATMUL_SIZE, REPEATS = 1 << 25, 1 << 11, 1024, 20
FLOAT = 4


def measure_rates(table_rows: int, width: int) -> dict[str, float]:
    """Return bytes per second of a copy and of random row gathers, and operations per second of a matmul.

    Args:
        table_rows: rows of the table that is read; a small table stays in the cache.
        width: floats of a row.
    """
    source, target = torch.randn(COPIED_FLOATS), torch.empty(COPIED_FLOATS)
    table, gathered = torch.randn(table_rows, width), torch.empty(GATHERED_ROWS, width)
    index = torch.randint(0, table_rows, (REPEATS, GATHERED_ROWS))
    matrix, product = torch.randn(MATMUL_SIZE, MATMUL_SIZE), torch.empty(MATMUL_SIZE, MATMUL_SIZE)
    copying = _measure(lambda _: target.copy_(source))
    gathering = _measure(lambda turn: torch.index_select(table, 0, index[turn], out=gathered))
    multiplying = _measure(lambda _: torch.mm(matrix, matrix, out=product))
    return {
        "copy": 2 * source.numel() * FLOAT / copying,  # reads and writes
        "gather": gathered.numel() * FLOAT / gathering,  # reads; the small target stays in the cache
        "matmul": 2 * MATMUL_SIZE**3 / multiplying,
    }


def _measure(run: Callable[[int], Any]) -> float:
    seconds = []
    for turn in range(REPEATS):
        started = time.perf_counter()
        run(turn)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def count_work(model: TrainableCfModel, train: Rows, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Return the mean work of a batch: ``gather`` and ``copy`` in bytes, ``matmul`` in operations.

    Args:
        model: mf, lightgcn, sasrec or din.
        train: its training rows.
        batches: contexts of each batch.
    """
    tables = [model.users.weight, model.items.weight]
    row_bytes = tables[1].shape[1] * FLOAT
    work = {"gather": 0.0, "copy": 0.0, "matmul": 0.0}
    if isinstance(model, LightGcn):
        edges = len(model.graph.columns)
        work["gather"] = 2 * 2 * model.num_layers * edges * model.dim * FLOAT
        work["copy"] = 7 * sum(table.numel() for table in tables) * FLOAT  # four arrays read, three written
        return work
    number = 0
    for contexts in batches:
        number += 1
        batch, _ = train.take(contexts, model.history_length if model.trains_on_history else 0)
        distinct = len(batch.item_idx.unique()) + len(batch.user_idx.unique())
        work["gather"] += 0 if model.trains_on_history else 6 * distinct * row_bytes
        if model.trains_on_history:
            work["matmul"] += _count_matmuls(model, batch)
    return {name: value / max(number, 1) for name, value in work.items()}


def _count_matmuls(model: TrainableCfModel, batch: Any) -> float:
    """Return the operations of a batch's linear layers; the backward pass has two matmuls for each of the forward's."""
    operations = 0.0

    def add(layer: nn.Module, inputs: Any, _: Any) -> None:
        nonlocal operations
        assert isinstance(layer, nn.Linear)
        operations += 3 * 2 * (inputs[0].numel() // layer.in_features) * layer.in_features * layer.out_features

    hooks = [layer.register_forward_hook(add) for layer in model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return operations


def compute_limit(work: dict[str, float], rates: dict[str, float]) -> float:
    """Return the seconds that the work of a batch takes at the measured rates."""
    return sum(work[name] / rates[name] for name in work)
