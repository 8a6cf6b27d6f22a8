"""Training of a CF model: pointwise BCE, Adam, early stopping. Plain torch, no DataLoader.

A worker processes the rows of a global batch whose users it owns. Losses are divided by the mean number of rows in a
batch, and the shared parameters' gradients are summed over the workers, so any number of workers makes the same steps
up to rounding. Adam's moments stay with their rows. Embedding tables use SparseAdam: a step updates only the rows that
its batch contains, so its cost does not grow with the tables.

Shapes: N rows of a worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.cf.batches import CfBatch, Rows, count_batches, iter_batches
from collm_dist.cf.item_text import keep_text
from collm_dist.cf.models.interface import TrainableCfModel, list_shared
from collm_dist.cf.optimizer import Optimizers
from collm_dist.cf.sharded_checkpoint import Progress, read_state, restore_state, save_state
from collm_dist.cf.user_shards import UserRanges
from collm_dist.distributed import gather_rows, get_rank, get_world_size, sum_gradients, sum_over_workers
from collm_dist.errors import ConfigError, DataError
from collm_dist.metrics import compute_auc, compute_logloss, compute_uauc
from collm_dist.random_keys import hash_integers, to_unit_interval

Metric = Literal["auc", "uauc", "logloss"]
METRICS: tuple[Metric, ...] = ("auc", "uauc", "logloss")
_SCORE_CONTEXTS = 1 << 14


@dataclass(frozen=True)
class TrainingPlan:
    """Training settings, named as in the ``cf`` section."""

    learning_rate: float
    weight_decay: float
    bias_weight_decay: float
    global_batch_size: int
    num_epochs: int
    select_metric: Metric
    early_stop_patience: int
    checkpoint_every_epochs: int
    unknown_item_share: float
    seed: int


@torch.no_grad()
def score_rows(model: TrainableCfModel, rows: Rows, contexts: Tensor | None = None) -> NDArray[np.float64]:
    """Return (N,) logits of a worker's rows, or of the given contexts' rows. Sets evaluation mode."""
    model.eval()
    parts = [torch.zeros(0, dtype=torch.float64)]
    if contexts is None:
        contexts = torch.arange(rows.num_contexts, device=rows.label.device)
    for chunk in torch.split(contexts, _SCORE_CONTEXTS):
        parts.append(model(rows.take(chunk, model.history_length)[0]).double().cpu())
    return np.asarray(torch.cat(parts).numpy())


def measure_scores(labels: NDArray[Any], scores: NDArray[Any], users: NDArray[Any]) -> dict[str, float]:
    """Return AUC, UAUC and log-loss of (N,) logits, without those that these rows do not define."""
    values = {
        "auc": compute_auc(labels, scores),
        "uauc": compute_uauc(labels, scores, users)[0],
        "logloss": compute_logloss(labels, scores),
    }
    return {name: value for name, value in values.items() if value is not None}


def compute_metrics(model: TrainableCfModel, rows: Rows) -> dict[str, float]:
    """Return the metrics of a model on one worker's rows; see ``measure_scores``."""
    return measure_scores(rows.label.cpu().numpy(), score_rows(model, rows), rows.row_users.cpu().numpy())


def sample_contexts(rows: Rows, max_contexts: int) -> Tensor:
    """Return the local numbers of this worker's contexts in an even sample of all workers' contexts.

    Global numbers decide, so any number of workers scores the same contexts and selects the same epoch.

    Args:
        rows: this worker's rows, numbered globally.
        max_contexts: maximum size of the sample over all workers; beyond it, every n-th context is taken.
    """
    step = -(-rows.total_contexts // max_contexts) or 1
    ends = [first for first, _ in rows.slices[1:]] + [rows.num_contexts]
    parts = [
        torch.arange(min(first + -number % step, end), end, step)
        for (first, number), end in zip(rows.slices, ends, strict=False)
    ]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(rows.label.device)


def gather_metrics(model: TrainableCfModel, rows: Rows, max_contexts: int = 1 << 18) -> dict[str, float]:
    """Return the metrics over the rows of all workers, or over an even sample. All workers call this together.

    Args:
        model: the trained model.
        rows: this worker's rows, numbered globally.
        max_contexts: maximum number of scored contexts over all workers, see ``sample_contexts``.
    """
    device = rows.label.device
    contexts = sample_contexts(rows, max_contexts)
    is_sampled = torch.zeros(rows.num_contexts, dtype=torch.bool, device=device)
    is_sampled[contexts] = True
    kept = is_sampled[rows.target_contexts]
    scores = gather_rows(torch.from_numpy(score_rows(model, rows, contexts)).to(device))
    labels = gather_rows(rows.label[kept])
    users = gather_rows(rows.row_users[kept].long() * get_world_size() + get_rank())
    values = torch.full((len(METRICS),), torch.nan, dtype=torch.float64, device=device)
    if get_rank() == 0:
        defined = measure_scores(labels.cpu().numpy(), scores.cpu().numpy(), users.cpu().numpy())
        values = torch.tensor([defined.get(name, torch.nan) for name in METRICS], dtype=torch.float64).to(device)
    if get_world_size() > 1:
        dist.broadcast(values, src=0)
    return {name: value for name, value in zip(METRICS, values.tolist(), strict=True) if np.isfinite(value)}


def check_metric(labels: NDArray[Any], users: NDArray[Any], metric: Metric) -> None:
    """Check that the validation rows define the metric that selects the best epoch.

    Args:
        labels, users: (N,) of the validation rows.
        metric: ``cf.select_metric``.

    Raises:
        DataError: the metric is not defined.
    """
    if metric == "auc" and compute_auc(labels, labels) is None:
        raise DataError("cf.select_metric: auc needs likes and dislikes among the validation rows; choose logloss")
    if metric == "uauc" and compute_uauc(labels, labels, users)[0] is None:
        raise DataError("cf.select_metric: uauc needs a user with likes and dislikes in validation; choose logloss")


def train_cf(
    model: TrainableCfModel,
    train: Rows,
    valid: Rows | None,
    users: UserRanges,
    plan: TrainingPlan,
    *,
    checkpoints: Path,
    key: str,
    on_epoch: Callable[[int, Mapping[str, float]], None],
) -> Progress:
    """Train until the metric stops improving; the best weights are in the checkpoint.

    All workers of the default process group call this together; without a group, one process trains alone. Training
    resumes exactly from a checkpoint of the same key, on any number of workers.

    Args:
        model: initialized and prepared, on its device, with the users that this worker owns.
        train: this worker's training rows, numbered globally. On the model's device.
        valid: this worker's validation rows; None = train for all epochs and keep the last weights.
        users: users that this worker owns.
        plan: the settings.
        checkpoints: folder visible to all workers.
        key: hash of everything that the training depends on.
        on_epoch: called on every worker after each epoch with the epoch's number and metrics, and with the ``seconds``
            since the epoch began, validation and checkpoint included.

    Raises:
        ConfigError: the loss is not finite.
        CheckpointError: the checkpoint is damaged.
    """
    optimizers = Optimizers(model, plan.learning_rate)
    progress, best = Progress(), copy_weights(model)
    if (state := read_state(checkpoints, key)) is not None:
        best, progress = restore_state(state, model, optimizers, users), state.progress
    started = time.perf_counter()
    while not progress.finished:
        epoch = progress.epoch + 1
        metrics = {"train_loss": train_epoch(model, optimizers, train, plan, epoch)}
        model.refresh()
        if valid is not None:
            metrics |= {f"valid_{name}": value for name, value in gather_metrics(model, valid).items()}
        if not progress.best_metrics or valid is None or is_better(metrics, progress.best_metrics, plan.select_metric):
            progress.best_epoch, progress.best_metrics, best = epoch, metrics, copy_weights(model)
        progress.epoch = epoch
        progress.finished = epoch >= min(plan.num_epochs, progress.best_epoch + plan.early_stop_patience)
        if progress.finished or epoch % plan.checkpoint_every_epochs == 0:
            save_state(checkpoints, key, model, optimizers, best, progress, users)
        now = time.perf_counter()
        on_epoch(epoch, metrics | {"seconds": now - started})
        started = now
    return progress


def train_epoch(model: TrainableCfModel, optimizers: Optimizers, train: Rows, plan: TrainingPlan, epoch: int) -> float:
    """Train for one epoch and return the mean loss of the rows, without the penalty.

    Raises:
        ConfigError: the loss is not finite.
    """
    model.train()
    shared = [parameter for _, parameter in list_shared(model)]
    mean_rows = train.total_rows / max(count_batches(train, plan.global_batch_size), 1)
    total = torch.zeros((), dtype=torch.float64, device=train.label.device)
    length = model.history_length if model.trains_on_history else 0
    for contexts in iter_batches(train, plan.global_batch_size, plan.seed, epoch):
        batch, rows = train.take(contexts, length)
        numbers = train.number(contexts.cpu().numpy())
        batch = _mask_items(batch, numbers, plan, epoch, with_text=model.items.text is not None)
        optimizers.zero_grad()
        total += model.backpropagate(
            batch, train.label[rows].float(), 1 / mean_rows, plan.weight_decay, plan.bias_weight_decay
        )
        sum_gradients(shared)
        optimizers.step()
    mean = float(sum_over_workers(total)) / max(train.total_rows, 1)
    if not np.isfinite(mean):
        raise ConfigError(f"cf.learning_rate {plan.learning_rate}: the loss is not finite in epoch {epoch}; lower it")
    return mean


def _mask_items(
    batch: CfBatch, numbers: NDArray[np.int64], plan: TrainingPlan, epoch: int, *, with_text: bool
) -> CfBatch:
    """Set the contexts' keys and replace a share of the target items by the unknown item, which trains its row.

    With texts, a replaced item is known by its text alone.
    """
    keys = (hash_integers(plan.seed, epoch, numbers) >> np.uint64(1)).astype(np.int64)
    if plan.unknown_item_share == 0:
        return replace(batch, keys=torch.from_numpy(keys).to(batch.item_idx.device))
    contexts, items = batch.target_contexts.cpu().numpy(), batch.item_idx.cpu().numpy()
    is_masked = to_unit_interval(hash_integers(plan.seed, keys[contexts], items)) < plan.unknown_item_share
    device = batch.item_idx.device
    unknown = keep_text(batch.item_idx) if with_text else torch.full_like(batch.item_idx, -1)
    return replace(
        batch,
        item_idx=torch.where(torch.from_numpy(is_masked).to(device), unknown, batch.item_idx),
        keys=torch.from_numpy(keys).to(device),
    )


def is_better(metrics: Mapping[str, float], best: Mapping[str, float], name: Metric) -> bool:
    """Return whether an epoch's selection metric is better than the best one so far."""
    new, old = metrics[f"valid_{name}"], best[f"valid_{name}"]
    return new < old if name == "logloss" else new > old


def copy_weights(model: TrainableCfModel) -> dict[str, Tensor]:
    """Return a copy of the model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
