"""From data to trained weights: one model, or with cross-fitting a chain of them. Runs on every worker alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from collm_dist.cf.batches import Rows, take_before
from collm_dist.cf.biases import fit_biases
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.models.registry import get_model_class, list_arguments
from collm_dist.cf.models.vector_table import VectorTable, read_vectors, read_width
from collm_dist.cf.sharded_checkpoint import State, read_state
from collm_dist.cf.trainer import TrainingPlan, gather_metrics, train_cf
from collm_dist.cf.user_shards import SPLITS, UserRanges, load_worker_data, number_globally
from collm_dist.cf.weight_transfer import load_previous_weights
from collm_dist.config import CfConfig
from collm_dist.data.ingest.forgetting import find_tombstones
from collm_dist.data.shards.interactions import load_item_table, load_user_ids, read_bucket
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.distributed import sum_over_workers
from collm_dist.errors import DataError
from collm_dist.runs.atomic_files import write_json

logger = logging.getLogger(__name__)

OnEpoch = Callable[[int, Mapping[str, float]], None]
_SAMPLED_TIMES = 1 << 20


@dataclass(frozen=True)
class Job:
    """What a worker is told; it reads the rest from the data folder.

    Attributes:
        data_dir: of the data step, absolute, seen by all nodes.
        checkpoints: folder of the training states, the same.
        key: names what the training depends on.
        cf: the model's settings.
        seed: of initial vectors and batches.
        fold_starts: see ``compute_fold_starts``; none = one model.
        splits: whose rows the workers load, and so the only ones that can be scored; train and valid are needed.
        previous: model file of the run that this one extends, to begin with.
    """

    data_dir: Path
    checkpoints: Path
    key: str
    cf: CfConfig
    seed: int
    fold_starts: tuple[int, ...] = ()
    splits: tuple[str, ...] = SPLITS
    previous: Path | None = None

    @property
    def result_path(self) -> Path:
        """Where the first worker leaves the metrics, once all is done."""
        return self.checkpoints / "result.json"

    def read_result(self) -> dict[str, Any] | None:
        """Return the metrics if this job is done."""
        if not self.result_path.exists():
            return None
        result: dict[str, Any] = json.loads(self.result_path.read_text(encoding="utf-8"))
        return result if result["key"] == self.key else None

    def name_part(self, fold: int) -> str:
        """Return the name of the model that serves a fold, 1 or more; the last is that of all rows."""
        return "final" if not self.fold_starts or fold == len(self.fold_starts) else f"fold-{fold:02d}"

    def list_parts(self) -> list[str]:
        """Return the names of the models to fit, in their order."""
        return [self.name_part(fold) for fold in range(1, max(len(self.fold_starts), 1) + 1)]

    def read_part(self, name: str) -> State | None:
        """Return a model's training state, None if there is none yet."""
        return read_state(self.checkpoints / name, self.key)


def compute_fold_starts(data_dir: Path, manifest: Manifest, num_folds: int) -> tuple[int, ...]:
    """Return the timestamps from which fold 1, 2, ... and what comes after the training rows begin.

    Folds hold about equal numbers of training rows; rows of one second are in one fold. Labels are not read. Of very
    many rows an even sample is looked at.

    Raises:
        DataError: the training rows have too few distinct times.
    """
    step = max(1, manifest.splits["train"].rows // _SAMPLED_TIMES)
    parts = []
    for bucket in manifest.buckets:
        table = read_bucket(data_dir, bucket, ["timestamp", "split"])
        parts.append(table.filter(pc.field("split") == "train").column("timestamp").to_numpy()[::step])
    times = np.sort(np.concatenate(parts))
    starts = [int(times[len(times) * fold // num_folds]) for fold in range(1, num_folds)]
    starts.append(manifest.splits["train"].last_timestamp + 1)
    if len(set(starts)) < num_folds or starts[0] <= times[0]:
        raise DataError(
            f"cf.cross_fit: {num_folds} folds by time are not possible, the training rows have "
            f"{len(np.unique(times))} distinct times, very unevenly filled; lower it or set it to off"
        )
    return tuple(starts)


def build_plan(cf: CfConfig, seed: int) -> TrainingPlan:
    """Return the trainer's settings."""
    names = TrainingPlan.__dataclass_fields__
    return TrainingPlan(**{name: getattr(cf, name) for name in names if name != "seed"}, seed=seed)


def fit(job: Job, device: torch.device, rank: int, world_size: int, on_epoch: OnEpoch) -> None:
    """Train all models of a job from where their checkpoints stand, and leave the last one's metrics.

    All workers call this together.

    Args:
        job: what to do.
        device: where to compute.
        rank, world_size: this worker, and how many there are.
        on_epoch: called after each epoch of the last model.

    Raises:
        CollmError: see ``train_cf``.
    """
    manifest = load_manifest(job.data_dir)
    data = load_worker_data(job.data_dir, manifest, rank, world_size, job.splits, with_counts=job.cf.feedback == "all")
    splits = {name: number_globally(rows.to(device)) for name, rows in data.splits.items()}
    state: State | None = None
    for fold, name in enumerate(job.list_parts(), start=1):
        if name == "final":
            train, valid, epochs, report = splits["train"], splits["valid"], job.cf.num_epochs, on_epoch
        else:
            train = number_globally(take_before(splits["train"], job.fold_starts[fold - 1]))
            valid, epochs, report = None, job.cf.fold_epochs, _ignore
        state = fit_model(job, name, manifest, data.users, train, valid, epochs, state, report)
    assert state is not None
    model = build_untrained(job.cf, manifest, data.users, splits["train"], job.seed)
    model.load_state_dict(state.read_shared("best") | state.read_owned("best", data.users))
    metrics = {name: gather_metrics(model.to(device), rows) for name, rows in splits.items()}
    if rank == 0:
        write_json(job.result_path, {"key": job.key, "metrics": metrics, "epochs": state.progress.epoch,
                                     "best_epoch": state.progress.best_epoch})  # fmt: skip


def _ignore(epoch: int, metrics: Mapping[str, float]) -> None:
    pass


def fit_model(
    job: Job,
    name: str,
    manifest: Manifest,
    users: UserRanges,
    train: Rows,
    valid: Rows | None,
    num_epochs: int,
    previous: State | None,
    on_epoch: OnEpoch,
) -> State:
    """Train one model from where its checkpoint stands and return its final state; see ``fit`` and ``train_cf``.

    Args:
        job: what to do.
        name: of the model.
        manifest: of the data.
        users: whom this worker owns.
        train, valid: its rows.
        num_epochs: most passes.
        previous: state of the fold before, whose weights this one starts from.
        on_epoch: called after each epoch.
    """
    state = job.read_part(name)
    if state is not None and state.progress.finished:
        return state
    device = train.label.device
    model = build_untrained(job.cf, manifest, users, train, job.seed)
    if isinstance(model, VectorTable):
        fill_vectors(model, job.cf, job.data_dir, users)
    model.to(device).prepare(train)
    if previous is not None:
        warm_start(model, previous.read_shared("best") | previous.read_owned("best", users))
    elif job.previous is not None and not job.fold_starts:  # it has seen labels that the first folds must not
        forgotten = torch.from_numpy(find_tombstones(job.data_dir))
        weights, sentence = load_previous_weights(job.previous, job.cf.model, model, users, forgotten)
        logger.info("cf: %s", sentence)
        if weights is not None:
            warm_start(model, weights)
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
    state = job.read_part(name)
    assert state is not None
    return state


def build_untrained(cf: CfConfig, manifest: Manifest, users: UserRanges, train: Rows, seed: int) -> TrainableCfModel:
    """Return the model that the settings ask for, with initial weights, on the CPU. All workers call this together."""
    arguments = list_arguments(cf, manifest.max_history_length, seed)
    if cf.model == "table":
        arguments["embedding_dim"] = read_width(Path(str(cf.item_vectors)))
    model = get_model_class(cf.model)(users.num_users, manifest.num_items, **arguments)
    if cf.feedback == "all":
        model.add_wide()
    user_counts = torch.bincount(train.row_users, minlength=users.num_users).cpu()
    item_counts = sum_over_workers(torch.bincount(train.item_idx, minlength=manifest.num_items)).cpu()
    masked = round(cf.unknown_item_share * train.total_rows)
    item_counts = torch.cat([item_counts, torch.tensor([masked])])
    model.init_weights(user_counts, item_counts, users.to_dense(), scale=cf.init_scale, seed=seed)
    return model


def fill_vectors(model: VectorTable, cf: CfConfig, data_dir: Path, users: UserRanges) -> None:
    """Read the vectors of all items, and of the users that this worker owns.

    Raises:
        DataError: see ``read_vectors``.
    """
    path = Path(str(cf.item_vectors))
    items = read_vectors(path, load_item_table(data_dir)["item_id"], model.dim)
    if cf.user_vectors is None:
        model.fill(None, items)
        return
    ids: Sequence[str] = load_user_ids(data_dir)
    owned = [ids[number] for number in users.to_dense().tolist()]
    model.fill(read_vectors(Path(cf.user_vectors), owned, model.dim), items)


@torch.no_grad()
def warm_start(model: TrainableCfModel, weights: Mapping[str, Tensor]) -> None:
    """Start from another training's weights; rows that it did not know keep their own."""
    for name, parameter in model.named_parameters():
        old = weights[name].to(parameter.device)
        table = name.removesuffix(".weight")
        known = weights.get(f"{table}.known")
        if known is None:
            parameter.copy_(old)
        else:
            rows = known.to(parameter.device)[:, None]
            parameter.copy_(torch.where(rows, old, parameter))
