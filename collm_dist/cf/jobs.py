"""Training jobs of the CF step: one per seed, planned and checked before any worker starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.cf.item_text import compute_text_vectors
from collm_dist.cf.models.registry import check_arguments
from collm_dist.cf.models.vector_table import read_vectors, read_width
from collm_dist.cf.sharded_checkpoint import TrainingState, read_state
from collm_dist.cf.trainer import check_metric
from collm_dist.cf.user_shards import SPLITS
from collm_dist.config import CfConfig, Config
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.errors import DataError
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.previous_run import find_previous_file
from collm_dist.runs.run_dir import RunDir


@dataclass(frozen=True)
class Job:
    """Instructions for the workers of one training; everything else they read from the data folder.

    Attributes:
        data_dir: absolute folder of the data step, visible on all nodes.
        checkpoints: absolute folder of the training states, visible on all nodes.
        key: hash of everything that the training depends on.
        cf: the ``cf`` section of the config.
        seed: of initial vectors and batches.
        fold_starts: see ``compute_fold_starts``; empty = one model.
        splits: splits whose rows the workers load, so the only ones that can be scored. Train and valid are required.
        previous: model file of the run that this one extends, to start from.
        item_text: file of the items' text vectors, visible on all nodes; None = no texts.
    """

    data_dir: Path
    checkpoints: Path
    key: str
    cf: CfConfig
    seed: int
    fold_starts: tuple[int, ...] = ()
    splits: tuple[str, ...] = SPLITS
    previous: Path | None = None
    item_text: Path | None = None

    @property
    def result_path(self) -> Path:
        """File of the metrics, written by the first worker once all models are trained."""
        return self.checkpoints / "result.json"

    def read_result(self) -> dict[str, Any] | None:
        """Return the metrics, None if the job is not done or its result is damaged."""
        try:
            result = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return result if isinstance(result, dict) and result.get("key") == self.key else None

    def load_item_text(self) -> NDArray[np.float32] | None:
        """Return the (I, K) text vectors of the items, None without texts."""
        if self.item_text is None:
            return None
        vectors: NDArray[np.float32] = np.load(self.item_text, allow_pickle=False)
        return vectors

    def name_model(self, fold: int) -> str:
        """Return the name of the model that serves a fold (1 or more); the last fold's is fitted to all rows."""
        return "final" if not self.fold_starts or fold == len(self.fold_starts) else f"fold-{fold:02d}"

    def list_models(self) -> list[str]:
        """Return the names of the models in the order in which they are fitted."""
        return [self.name_model(fold) for fold in range(1, max(len(self.fold_starts), 1) + 1)]

    def read_state(self, model: str) -> TrainingState | None:
        """Return a model's training state, None if there is none yet."""
        return read_state(self.checkpoints / model, self.key)


def plan_jobs(
    config: Config, data_dir: Path, checkpoints: Path, key: str, fold_starts: tuple[int, ...] = ()
) -> list[Job]:
    """Return one job per seed; create its checkpoint folder and the file of the items' text vectors.

    Only the first job fits the folds: stage 2 reads its vectors, and the other seeds measure the spread.

    Args:
        config: the experiment.
        data_dir: absolute folder of the data step.
        checkpoints: parent folder of the jobs' checkpoints.
        key: hash of everything that the trainings depend on.
        fold_starts: see ``compute_fold_starts``; empty without cross-fitting.
    """
    item_text = None
    if config.cf.item_text is not None:
        item_text = checkpoints / f"item_text-{key[:16]}.npy"
        write_text_vectors(data_dir, config.cf.item_text, item_text)
    jobs = []
    for number, seed in enumerate(config.cf.seeds or (config.run.seed,)):
        folder = checkpoints / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        folds = () if number else fold_starts
        previous = find_previous_file(config, "cf")
        if previous is not None:
            check_files(RunDir(previous.parents[1]), "cf")
        jobs.append(Job(data_dir, folder, key, config.cf, seed, folds, previous=previous, item_text=item_text))
    return jobs


def write_text_vectors(data_dir: Path, width: int, path: Path) -> None:
    """Write the text vectors of the data's items for ``Job.item_text``, unless the file exists.

    Args:
        data_dir: folder of the data step.
        width: ``cf.item_text``.
        path: file of the vectors, of no other texts or width.
    """
    if path.exists():
        return
    with show_phase("cf: vectors of item texts"):
        vectors = compute_text_vectors(load_item_table(data_dir)["text"], width)
    with open_atomic(path, "wb") as file:
        np.save(file, vectors)


def check_inputs(cf: CfConfig, data_dir: Path) -> None:
    """Check the model's arguments, the selection metric and given vectors before any work.

    Raises:
        ConfigError: the model's class or arguments are invalid.
        DataError: the validation rows do not define the selection metric, or given vectors are invalid.
    """
    check_arguments(cf)
    valid = load_interactions(data_dir, ["user_idx", "label"], "valid")
    check_metric(valid["label"].astype(np.float64), valid["user_idx"], cf.select_metric)
    if cf.model == "table":
        width = read_width(Path(str(cf.item_vectors)))
        tables = {str(cf.item_vectors): load_item_table(data_dir)["item_id"]}
        if cf.user_vectors is not None:
            tables[cf.user_vectors] = load_user_ids(data_dir)
        for path, ids in tables.items():
            if not read_vectors(Path(path), ids, width).any():
                raise DataError(
                    f"cf: {path} has a vector for none of the data's ids, such as {ids[0]!r}; its column id must "
                    "hold the raw ids of the data"
                )
