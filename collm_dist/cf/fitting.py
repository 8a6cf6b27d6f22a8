"""Fitting of one CF model: initial weights, warm start, training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collm_dist.cf.batches import Rows
from collm_dist.cf.biases import fit_biases
from collm_dist.cf.jobs import Job
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.models.registry import get_model_class, list_arguments
from collm_dist.cf.models.vector_table import VectorTable, read_vectors, read_width
from collm_dist.cf.optimizer import Optimizers
from collm_dist.cf.sharded_checkpoint import Progress, TrainingState, save_state
from collm_dist.cf.trainer import TrainingPlan, copy_weights, train_cf
from collm_dist.cf.user_shards import UserRanges, load_worker_data, number_globally
from collm_dist.cf.weight_transfer import copy_known_rows, load_previous_weights
from collm_dist.config import CfConfig
from collm_dist.data.ingest.forgotten_users import find_tombstones
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import Manifest
from collm_dist.distributed import sum_over_workers

logger = logging.getLogger(__name__)

# Receives an epoch's number and its metrics, see ``train_cf``.
OnEpoch = Callable[[int, Mapping[str, float]], None]


def build_plan(cf: CfConfig, seed: int) -> TrainingPlan:
    """Return the trainer's settings."""
    names = TrainingPlan.__dataclass_fields__
    return TrainingPlan(**{name: getattr(cf, name) for name in names if name != "seed"}, seed=seed)


def fit_model(
    job: Job,
    name: str,
    manifest: Manifest,
    users: UserRanges,
    train: Rows,
    valid: Rows | None,
    num_epochs: int,
    previous: TrainingState | None,
    on_epoch: OnEpoch,
) -> TrainingState:
    """Train one model, resuming from its checkpoint, and return its final state. All workers call this together.

    Args:
        job: the job that the model belongs to.
        name: of the model, see ``Job.list_models``.
        manifest: of the data.
        users: users that this worker owns.
        train, valid: this worker's rows, see ``train_cf``.
        num_epochs: maximum number of passes over the training rows.
        previous: state of the fold before, whose weights this model starts from.
        on_epoch: called after each epoch.

    Raises:
        CollmError: see ``train_cf``.
    """
    state = job.read_state(name)
    if state is not None and state.progress.finished:
        return state
    device = train.label.device
    model = build_untrained(job.cf, manifest, users, train, job.seed, job.load_item_text())
    if isinstance(model, VectorTable):
        fill_vectors(model, job.cf, job.data_dir, users)
    model.to(device).prepare(train)
    if previous is not None:
        copy_known_rows(model, previous.read_shared("best") | previous.read_owned("best", users))
    elif job.previous is not None and not job.fold_starts:  # it has seen labels that the first folds must not
        forgotten = torch.from_numpy(find_tombstones(job.data_dir))
        weights, message = load_previous_weights(job.previous, job.cf.model, model, users, forgotten)
        logger.info("cf: %s", message)
        if weights is not None:
            copy_known_rows(model, weights)
    fit_biases(model, train, job.cf.bias_weight_decay)
    train_cf(
        model,
        train,
        valid,
        users,
        replace(build_plan(job.cf, job.seed), num_epochs=num_epochs),
        checkpoints=job.checkpoints / name,
        key=job.key,
        on_epoch=on_epoch,
    )
    state = job.read_state(name)
    assert state is not None
    return state


def resolve_arguments(cf: CfConfig, manifest: Manifest, seed: int) -> dict[str, Any]:
    """Return the constructor arguments of the configured model; given vectors define their own width.

    Raises:
        DataError: see ``read_width``.
    """
    arguments = list_arguments(cf, manifest.max_history_length, seed)
    if cf.model == "table":
        arguments["embedding_dim"] = read_width(Path(str(cf.item_vectors)))
    return arguments


def build_untrained(
    cf: CfConfig,
    manifest: Manifest,
    users: UserRanges,
    train: Rows,
    seed: int,
    item_text: NDArray[np.float32] | None = None,
) -> TrainableCfModel:
    """Return the configured model with initial weights, on the CPU. All workers call this together.

    Args:
        cf: the settings.
        manifest: of the data.
        users: users that this worker owns.
        train: this worker's training rows, numbered globally.
        seed: of the initial weights.
        item_text: (I, K) text vectors of the items; None = no texts.
    """
    arguments = resolve_arguments(cf, manifest, seed)
    model = get_model_class(cf.model)(users.num_users, manifest.num_items, **arguments)
    if cf.feedback == "all":
        model.add_wide()
    if item_text is not None:
        model.items.add_text(torch.from_numpy(item_text), train.total_rows)
    user_counts = torch.bincount(train.row_users, minlength=users.num_users).cpu()
    item_counts = sum_over_workers(torch.bincount(train.item_idx, minlength=manifest.num_items)).cpu()
    num_masked = round(cf.unknown_item_share * train.total_rows)
    item_counts = torch.cat([item_counts, torch.tensor([num_masked])])
    model.init_weights(user_counts, item_counts, users.to_dense(), scale=cf.init_scale, seed=seed)
    return model


def fill_vectors(model: VectorTable, cf: CfConfig, data_dir: Path, users: UserRanges) -> None:
    """Load the given vectors of all items, and of the users that this worker owns.

    Raises:
        DataError: see ``read_vectors``.
    """
    path = Path(str(cf.item_vectors))
    items = read_vectors(path, load_item_table(data_dir)["item_id"], model.dim)
    if cf.user_vectors is None:
        model.fill(None, items)
        return
    ids: Sequence[str] = load_user_ids(data_dir)
    owned_ids = [ids[number] for number in users.to_dense().tolist()]
    model.fill(read_vectors(Path(cf.user_vectors), owned_ids, model.dim), items)


def save_untrained(job: Job, manifest: Manifest) -> None:
    """Save initial weights as a finished training state, for a model that only stage 2 trains (``cf.model: none``)."""
    data = load_worker_data(job.data_dir, manifest)
    train = number_globally(data.splits["train"], data.users)
    model = build_untrained(job.cf, manifest, data.users, train, job.seed)
    optimizers = Optimizers(model, job.cf.learning_rate)
    folder = job.checkpoints / job.name_model(1)
    save_state(folder, job.key, model, optimizers, copy_weights(model), Progress(finished=True), data.users)
