"""CF pretraining as a Ray Train job: 1..N workers, checkpoints, and a restart where a worker dies."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collm_dist.artifacts import (
    RunDir,
    compute_file_hash,
    compute_fingerprint,
    compute_json_hash,
    is_step_current,
    write_json,
)
from collm_dist.cf.export import save_cf_model
from collm_dist.cf.mf import MatrixFactorization
from collm_dist.cf.trainer import METRICS, CfProgress, CfTrainer, compute_metrics
from collm_dist.config import CfConfig, Config
from collm_dist.data.interactions import load_interactions
from collm_dist.data.manifest import load_manifest
from collm_dist.errors import CheckpointError, LaunchError
from collm_dist.evaluation.metrics import compute_auc
from collm_dist.orchestration.cluster import connect_ray

COLUMNS = ("user_idx", "item_idx", "label", "row_id")
# Rows of events that a mean is smoothed with; see evaluation.baselines.
_ITEM_PRIOR = 5.0


def run_pretrain(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the CF step, unless it is done, and return its summary.

    Args:
        config: the experiment.
        run_dir: whose data step is done.
        force: redo it even if it is done.

    Raises:
        ArtifactError: the data step is not done, or this one was done with something else.
        LaunchError: workers kept dying.
    """
    fingerprint = compute_fingerprint(config, "cf", run_dir)
    if not force and is_step_current(run_dir, "cf", fingerprint):
        print(f"cf: done already ({run_dir.step_dir('cf')})")
        return run_dir.read_record("cf")
    folder = run_dir.step_dir("cf").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    run_dir.record_path("cf").unlink(missing_ok=True)
    checkpoint = folder / "checkpoints" / f"{compute_json_hash(fingerprint)[:12]}.safetensors"
    if force:
        checkpoint.unlink(missing_ok=True)
    settings = {
        "cf": config.cf,
        "seed": config.run.seed,
        "data_dir": str(run_dir.step_dir("data").absolute()),
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "checkpoint_every_epochs": config.cf.checkpoint_every_epochs,
        "progress_bar": config.monitoring.progress_bar,
    }
    with connect_ray(config.cluster):
        _fit_on_ray(settings, config.cf.num_workers, folder)
    summary = _summarize(run_dir, settings) | {"fingerprint": fingerprint}
    summary["content_hash"] = compute_file_hash(folder / "model.safetensors")
    write_json(run_dir.record_path("cf"), summary)
    checkpoint.unlink(missing_ok=True)
    _print_summary(summary)
    return summary


def _fit_on_ray(settings: dict[str, Any], num_workers: int, folder: Path) -> None:
    # Late: Ray Train takes seconds to import, and a finished step needs none of it.
    from ray import train
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = TorchTrainer(
        fit_worker,
        train_loop_config=settings,
        scaling_config=train.ScalingConfig(num_workers=num_workers, use_gpu=torch.cuda.is_available()),
        run_config=train.RunConfig(
            name="ray", storage_path=str(folder / "checkpoints"), failure_config=train.FailureConfig(max_failures=3)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        # Ray wraps what a worker raised in errors of its own, differently from release to release.
        raise LaunchError(f"cf: training on {num_workers} Ray workers failed: {error}") from error


def fit_worker(settings: dict[str, Any]) -> None:
    """Train on one worker; rank 0 writes checkpoints and the model.

    A restarted worker goes on from the last checkpoint in the run directory, which is also what a rerun of the whole
    command does.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // (torch.distributed.get_world_size() if rank or
                          torch.distributed.is_initialized() else 1)))  # fmt: skip
    data_dir, folder, checkpoint = (Path(settings[name]) for name in ("data_dir", "folder", "checkpoint"))
    manifest = load_manifest(data_dir)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    trainer = build_trainer(settings["cf"], settings["seed"], data_dir, device)
    if checkpoint.exists():
        try:
            trainer.load(checkpoint)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint} is damaged ({error}); delete it to train anew") from error

    def after_epoch(progress: CfProgress) -> None:
        due = progress.epoch % settings["checkpoint_every_epochs"] == 0 or trainer.is_finished
        if rank == 0 and due:
            trainer.save(checkpoint)

    trainer.run(after_epoch)
    if rank == 0:
        save_cf_model(folder / "model.safetensors", trainer.model, manifest)
        write_json(folder / "progress.json", asdict(trainer.progress))


def build_trainer(cf: CfConfig, seed: int, data_dir: Path, device: torch.device) -> CfTrainer:
    """Return the trainer that the settings ask for."""
    manifest = load_manifest(data_dir)
    model = MatrixFactorization(manifest.num_users, manifest.num_items, cf.embedding_dim, cf.init_scale, seed)
    return CfTrainer(
        model,
        load_interactions(data_dir, COLUMNS, "train"),
        load_interactions(data_dir, COLUMNS, "valid"),
        learning_rate=cf.learning_rate,
        weight_decay=cf.weight_decay,
        global_batch_size=cf.global_batch_size,
        num_epochs=cf.num_epochs,
        select_metric=cf.select_metric,
        patience=cf.early_stop_patience,
        seed=seed,
        device=device,
    )


def _summarize(run_dir: RunDir, settings: dict[str, Any]) -> dict[str, Any]:
    from collm_dist.cf.export import load_cf_model

    data_dir = run_dir.step_dir("data")
    model = load_cf_model(run_dir, load_manifest(data_dir))
    rows = {split: load_interactions(data_dir, COLUMNS, split) for split in ("train", "valid", "test")}
    progress = CfProgress(**_read_progress(Path(settings["folder"])))
    item_mean = _score_item_mean(rows["train"], rows["valid"]["item_idx"], len(model.item_bias) - 1)
    baseline = compute_auc(rows["valid"]["label"], item_mean)
    metrics = {split: compute_metrics(model, rows[split]) for split in ("valid", "test")}
    auc = metrics["valid"]["auc"]
    return {
        "model": "mf",
        "metrics": metrics,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "item_mean_valid_auc": baseline,
        "beats_item_mean": auc is not None and baseline is not None and auc > baseline,
        "history": progress.history,
    }


def _read_progress(folder: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return found


def _score_item_mean(train: dict[str, Any], items: Any, num_items: int) -> Any:
    """The baseline that a useful model must beat: the item's smoothed share of likes in training."""
    likes = np.bincount(train["item_idx"], weights=train["label"], minlength=num_items)
    counts = np.bincount(train["item_idx"], minlength=num_items)
    means = (likes + _ITEM_PRIOR * train["label"].mean()) / (counts + _ITEM_PRIOR)
    return means[items]


def _print_summary(summary: dict[str, Any]) -> None:
    print(f"cf: best of {summary['epochs']} epochs is {summary['best_epoch']}")
    for split, metrics in summary["metrics"].items():
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in METRICS if metrics[name] is not None)
        print(f"  {split:5} {shown}")
    if not summary["beats_item_mean"]:
        print(
            "  WARNING: the model does not beat the item mean on valid "
            f"(AUC {summary['item_mean_valid_auc']}); its vectors will bring little. Look at cf.learning_rate, "
            "cf.weight_decay and cf.num_epochs."
        )
