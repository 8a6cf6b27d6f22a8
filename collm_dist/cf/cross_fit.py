"""Cross-fitting by time: one model per fold, fitted to the rows before it and warm-started from its predecessor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from collm_dist.cf.batches import take_before
from collm_dist.cf.fitting import OnEpoch, build_untrained, fit_model
from collm_dist.cf.jobs import Job
from collm_dist.cf.sharded_checkpoint import TrainingState
from collm_dist.cf.trainer import gather_metrics
from collm_dist.cf.user_shards import load_worker_data, number_globally
from collm_dist.data.shards.context_block import IntArray
from collm_dist.data.shards.interactions import read_bucket
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.errors import DataError
from collm_dist.runs.atomic_files import write_json

_SAMPLED_TIMES = 1 << 20


def compute_fold_starts(data_dir: Path, manifest: Manifest, num_folds: int) -> tuple[int, ...]:
    """Return the timestamps (seconds) at which folds 1, 2, ... and the time after the training rows begin.

    Folds hold about equal numbers of training rows; rows of the same second are in the same fold. Labels are not read.
    Beyond a million rows an even sample of the timestamps is used.

    Raises:
        DataError: the training rows have too few distinct timestamps.
    """
    times = load_train_times(data_dir, manifest)
    starts = [int(times[len(times) * fold // num_folds]) for fold in range(1, num_folds)]
    starts.append(manifest.splits["train"].last_timestamp + 1)
    if len(set(starts)) < num_folds or starts[0] <= times[0]:
        raise DataError(
            f"cf.cross_fit: {num_folds} folds by time are not possible, the training rows have "
            f"{len(np.unique(times))} distinct timestamps, unevenly filled; lower it or set it to off"
        )
    return tuple(starts)


def load_train_times(data_dir: Path, manifest: Manifest) -> IntArray:
    """Return the sorted timestamps (seconds) of the training rows; beyond a million rows an even sample of them.

    Raises:
        ArtifactError: a table is missing or damaged.
    """
    step = max(1, manifest.splits["train"].rows // _SAMPLED_TIMES)
    parts = []
    for bucket in manifest.buckets:
        table = read_bucket(data_dir, bucket, ["timestamp", "split"])
        parts.append(table.filter(pc.field("split") == "train").column("timestamp").to_numpy()[::step])
    return np.sort(np.concatenate(parts))


def fit_job(job: Job, device: torch.device, rank: int, world_size: int, on_epoch: OnEpoch) -> None:
    """Fit all models of a job, resuming from their checkpoints, and write the metrics of the last one.

    All workers call this together.

    Args:
        job: models to fit.
        device: device of this worker.
        rank, world_size: place of this worker among the job's workers.
        on_epoch: called after each epoch of the last model.

    Raises:
        CollmError: see ``train_cf``.
    """
    manifest = load_manifest(job.data_dir)
    data = load_worker_data(job.data_dir, manifest, rank, world_size, job.splits, with_counts=job.cf.feedback == "all")
    splits = {name: number_globally(rows.to(device), data.users) for name, rows in data.splits.items()}
    state: TrainingState | None = None
    for fold, name in enumerate(job.list_models(), start=1):
        if name == "final":
            train, valid, epochs, report = splits["train"], splits["valid"], job.cf.num_epochs, on_epoch
        else:
            early = take_before(splits["train"], job.fold_starts[fold - 1])
            train = number_globally(early, data.users)
            valid, epochs, report = None, job.cf.fold_epochs, _ignore
        state = fit_model(job, name, manifest, data.users, train, valid, epochs, state, report)
    assert state is not None
    model = build_untrained(job.cf, manifest, data.users, splits["train"], job.seed, job.load_item_text())
    model.load_state_dict(state.read_shared("best") | state.read_owned("best", data.users))
    metrics = {name: gather_metrics(model.to(device), rows) for name, rows in splits.items()}
    if rank == 0:
        write_json(job.result_path, {"key": job.key, "metrics": metrics, "epochs": state.progress.epoch,
                                     "best_epoch": state.progress.best_epoch})  # fmt: skip


def _ignore(epoch: int, metrics: Mapping[str, float]) -> None:
    pass
