"""Training of a collaborative-filtering model: pointwise BCE, Adam, early stop. Plain torch, no DataLoader.

The batches are a function of the seed, the epoch and the batch size alone. A worker takes those rows of a global batch
whose users it owns; losses are divided by the rows of the whole batch and gradients are summed over the workers, so
any number of workers makes the same steps within rounding.

Shapes: N training rows in all, B rows of a worker's share of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.cf.checkpoint import Progress, read_state, restore_state, save_state
from collm_dist.data.hashing import hash_integers
from collm_dist.errors import ConfigError, DataError
from collm_dist.evaluation.metrics import compute_auc, compute_logloss, compute_uauc

Metric = Literal["auc", "uauc", "logloss"]
METRICS: tuple[Metric, ...] = ("auc", "uauc", "logloss")
_SCORE_ROWS = 1 << 18


@dataclass(frozen=True)
class Rows:
    """N labelled pairs; training rows are sorted by user.

    Attributes:
        user_idx, item_idx: (N,) dense indices.
        label: (N,) float32, 1 = like, 0 = dislike or sampled negative.
    """

    user_idx: Tensor
    item_idx: Tensor
    label: Tensor

    @classmethod
    def from_arrays(cls, user_idx: NDArray[Any], item_idx: NDArray[Any], label: NDArray[Any]) -> Rows:
        """Take (N,) arrays."""
        return cls(torch.from_numpy(user_idx), torch.from_numpy(item_idx), torch.from_numpy(label).float())

    def take(self, rows: Tensor | slice) -> Rows:
        """Return some rows."""
        return Rows(self.user_idx[rows], self.item_idx[rows], self.label[rows])

    def to(self, device: torch.device) -> Rows:
        """Copy to a device."""
        return Rows(self.user_idx.to(device), self.item_idx.to(device), self.label.to(device))


@dataclass(frozen=True)
class TrainingPlan:
    """Settings of a training; the names are those of the ``cf`` section."""

    learning_rate: float
    weight_decay: float
    global_batch_size: int
    num_epochs: int
    select_metric: Metric
    early_stop_patience: int
    checkpoint_every_epochs: int
    seed: int


def find_owned_rows(user_idx: Tensor, rank: int, world_size: int) -> tuple[int, int]:
    """Return the [first, last) training rows of the users that a worker owns: even shares, cut between users.

    Args:
        user_idx: (N,) ascending.
        rank, world_size: the worker, and how many there are.
    """
    cuts = [0]
    for worker in range(1, world_size):
        user = user_idx[len(user_idx) * worker // world_size]
        cuts.append(int(torch.searchsorted(user_idx, user)))
    cuts.append(len(user_idx))
    return cuts[rank], cuts[rank + 1]


def iter_batches(num_rows: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the row numbers of each global batch of an epoch; the last one may be smaller."""
    order = torch.from_numpy(np.argsort(hash_integers(seed, epoch, np.arange(num_rows)), kind="stable"))
    for first in range(0, num_rows, batch_size):
        yield order[first : first + batch_size]


@torch.no_grad()
def score_rows(model: Any, rows: Rows) -> NDArray[np.float64]:
    """Return (N,) logits."""
    parts = []
    for first in range(0, len(rows.label), _SCORE_ROWS):
        part = rows.take(slice(first, first + _SCORE_ROWS))
        parts.append(model.score(part.user_idx, _no_history(part), part.item_idx).double().cpu())
    return np.asarray(torch.cat(parts).numpy())


def measure_scores(labels: NDArray[Any], scores: NDArray[Any], users: NDArray[Any]) -> dict[str, float]:
    """Return AUC, UAUC and log-loss of (N,) logits; one that is not defined on these rows is left out."""
    values = {
        "auc": compute_auc(labels, scores),
        "uauc": compute_uauc(labels, scores, users)[0],
        "logloss": compute_logloss(labels, scores),
    }
    return {name: value for name, value in values.items() if value is not None}


def compute_metrics(model: Any, rows: Rows) -> dict[str, float]:
    """Score the rows with a model; see measure_scores."""
    return measure_scores(rows.label.cpu().numpy(), score_rows(model, rows), rows.user_idx.cpu().numpy())


def check_metric(valid: Rows, metric: Metric) -> None:
    """Refuse validation rows on which the metric that picks the best epoch is not defined.

    Raises:
        DataError: there is nothing to select by.
    """
    labels, users = valid.label.numpy(), valid.user_idx.numpy()
    if metric == "auc" and compute_auc(labels, labels) is None:
        raise DataError("cf.select_metric: auc needs likes and dislikes among the validation rows; choose logloss")
    if metric == "uauc" and compute_uauc(labels, labels, users)[0] is None:
        raise DataError("cf.select_metric: uauc needs a user with likes and dislikes in validation; choose logloss")


def train_cf(
    model: nn.Module,
    train: Rows,
    valid: Rows,
    plan: TrainingPlan,
    *,
    checkpoint_path: Path,
    key: str,
    on_epoch: Callable[[int, Mapping[str, float]], None],
) -> Progress:
    """Train until the metric stops getting better; the best weights end up in the checkpoint.

    All workers of the default process group call this together, with the same arguments; without a group it trains
    alone. A checkpoint of the same key is continued as if there had been no break.

    Args:
        model: a TrainableCfModel, the same on every worker, on its device.
        train: all training rows sorted by user; valid: all validation rows. On the model's device.
        plan: the settings.
        checkpoint_path: seen by all workers; the first one writes it.
        key: names what the training depends on.
        on_epoch: called on every worker after each epoch with its number and its metrics.

    Raises:
        ConfigError: the loss is not finite.
        CheckpointError: the checkpoint is damaged.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.learning_rate)
    progress, best = Progress(), _copy_weights(model)
    if (state := read_state(checkpoint_path, key)) is not None:
        best, progress = restore_state(state[0], model, optimizer), state[1]
    while not progress.finished:
        epoch = progress.epoch + 1
        metrics = {"train_loss": _train_epoch(model, optimizer, train, plan, epoch), **_validate(model, valid)}
        if not progress.best_metrics or _is_better(metrics, progress.best_metrics, plan.select_metric):
            progress.best_epoch, progress.best_metrics, best = epoch, metrics, _copy_weights(model)
        progress.epoch = epoch
        progress.finished = epoch >= min(plan.num_epochs, progress.best_epoch + plan.early_stop_patience)
        if _get_rank() == 0 and (progress.finished or epoch % plan.checkpoint_every_epochs == 0):
            save_state(checkpoint_path, key, model, optimizer, best, progress)
        on_epoch(epoch, metrics)
    return progress


def _train_epoch(model: Any, optimizer: torch.optim.Optimizer, train: Rows, plan: TrainingPlan, epoch: int) -> float:
    """Return the mean training loss, without the penalty."""
    device = train.label.device
    first, last = find_owned_rows(train.user_idx, _get_rank(), _get_world_size())
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in iter_batches(len(train.label), plan.global_batch_size, plan.seed, epoch):
        rows = train.take(batch[(batch >= first) & (batch < last)].to(device))
        logits = model.score(rows.user_idx, _no_history(rows), rows.item_idx)
        loss = functional.binary_cross_entropy_with_logits(logits, rows.label, reduction="sum")
        penalty = plan.weight_decay * model.compute_penalty(rows.user_idx, rows.item_idx)
        optimizer.zero_grad(set_to_none=False)
        ((loss + penalty) / len(batch)).backward()
        if _get_world_size() > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        total += loss.detach()
    if _get_world_size() > 1:
        dist.all_reduce(total)
    mean = float(total) / len(train.label)
    if not np.isfinite(mean):
        raise ConfigError(f"cf.learning_rate {plan.learning_rate}: the loss is not finite in epoch {epoch}; lower it")
    return mean


def _validate(model: nn.Module, valid: Rows) -> dict[str, float]:
    """Compute the metrics on the first worker and give all workers its numbers, so that all decide alike."""
    values = torch.full((len(METRICS),), torch.nan, dtype=torch.float64, device=valid.label.device)
    if _get_rank() == 0:
        found = compute_metrics(model, valid)
        values = torch.tensor([found.get(name, torch.nan) for name in METRICS], dtype=torch.float64).to(values.device)
    if _get_world_size() > 1:
        dist.broadcast(values, src=0)
    numbers = zip(METRICS, values.tolist(), strict=True)
    return {f"valid_{name}": value for name, value in numbers if np.isfinite(value)}


def _is_better(metrics: Mapping[str, float], best: Mapping[str, float], name: Metric) -> bool:
    new, old = metrics[f"valid_{name}"], best[f"valid_{name}"]
    return new < old if name == "logloss" else new > old


def _copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _no_history(rows: Rows) -> Tensor:
    return rows.user_idx.new_empty(len(rows.user_idx), 0)


def _get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
