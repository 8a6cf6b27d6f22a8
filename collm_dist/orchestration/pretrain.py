"""CF pretraining as a Ray Train job: 1..N workers, a restart where one dies, and the step's summary."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from tqdm import tqdm

from collm_dist.artifacts import (
    RunDir,
    compute_fingerprint,
    compute_json_hash,
    is_step_current,
    write_json,
)
from collm_dist.cf.checkpoint import read_state, take_group
from collm_dist.cf.export import FILE_NAME, MODEL_CLASSES, save_cf_model
from collm_dist.cf.trainer import Rows, TrainingPlan, check_metric, train_cf
from collm_dist.config import CfConfig, Config
from collm_dist.data.interactions import load_interactions
from collm_dist.data.manifest import Manifest, load_manifest
from collm_dist.errors import CollmError, LaunchError
from collm_dist.monitoring import TRAIN_LOSS, VALID_AUC, RunLogger, read_metrics
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.pretrain_summary import print_summary, summarize

# A run with more lost workers than this gives up; its last checkpoint stays.
MAX_FAILURES = 3
SHOWN = (TRAIN_LOSS, VALID_AUC)
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What a worker is told; it reads the rest from the run directory.

    Attributes:
        data_dir, folder: of the steps data and cf, absolute, seen by all nodes.
        checkpoint: file of the training state.
        key: names what the training depends on.
        cf: the model's settings.
        seed: of initial vectors and batches.
        tensorboard: whether to write it.
    """

    data_dir: Path
    folder: Path
    checkpoint: Path
    key: str
    cf: CfConfig
    seed: int
    tensorboard: bool


def run_pretrain(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the CF step, unless it is done, and return its summary.

    Training that was interrupted, by a lost worker or as a whole, goes on from its last checkpoint.

    Args:
        config: the experiment.
        run_dir: whose data step is done.
        force: redo it from the start even if it is done.

    Raises:
        ArtifactError: the data step is not done, or this one was done with something else.
        DataError: the validation rows cannot tell which epoch is best.
        LaunchError: too few CPUs, or workers kept dying.
    """
    fingerprint = compute_fingerprint(config, "cf", run_dir)
    if not force and is_step_current(run_dir, "cf", fingerprint):
        print(f"cf: done already ({run_dir.step_dir('cf')})")
        return run_dir.read_record("cf")
    folder, data_dir = run_dir.step_dir("cf").absolute(), run_dir.step_dir("data").absolute()
    run_dir.withdraw("cf")
    checkpoints = folder / "checkpoints"
    if force:
        shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    job = Job(
        data_dir=data_dir,
        folder=folder,
        checkpoint=checkpoints / "last.safetensors",
        key=compute_json_hash(fingerprint),
        cf=config.cf,
        seed=config.run.seed,
        tensorboard=config.monitoring.tensorboard,
    )
    check_metric(load_rows(data_dir, "valid"), config.cf.select_metric)
    state = read_state(job.checkpoint, job.key)
    if state is None or not state[1].finished:
        with connect_ray(config.cluster), _show_progress(job, config.monitoring.progress_bar):
            _fit_on_ray(job)
    summary = _export(job) | {"fingerprint": fingerprint}
    write_json(run_dir.record_path("cf"), summary)
    shutil.rmtree(checkpoints)
    print_summary(summary, run_dir.record_path("cf"))
    return summary


def _fit_on_ray(job: Job) -> None:
    from ray import train  # late: it takes seconds to import, and a finished step needs none of it
    from ray.train.torch import TorchTrainer

    num_workers, resources = job.cf.num_workers, ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) >= num_workers
    if resources.get("CPU", 0) < num_workers:
        raise LaunchError(f"cf.num_workers: {num_workers} workers need a CPU each, Ray has "
                          f"{resources.get('CPU', 0):.0f}; lower it or raise cluster.ray_num_cpus")  # fmt: skip
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    storage = job.folder / "checkpoints" / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    trainer = TorchTrainer(
        fit_worker,
        train_loop_config={"job": job},
        scaling_config=train.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=train.RunConfig(
            name="cf",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except Exception as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, CollmError):
                raise failure from None
        raise LaunchError(f"cf: training failed on {num_workers} Ray workers ({error}); run the command again to go "
                          "on from the last checkpoint") from error  # fmt: skip
    finally:
        # Ray Train leaves a handler of its own behind, which would answer a later Ctrl-C with a dead cluster.
        signal.signal(signal.SIGINT, on_interrupt)


def fit_worker(settings: Mapping[str, Any]) -> None:
    """Train on one Ray Train worker; the first one writes checkpoints and the log."""
    from ray import train
    from ray.train.torch import get_device

    job: Job = settings["job"]
    device = get_device()
    train_rows, valid_rows = (load_rows(job.data_dir, split) for split in ("train", "valid"))
    model = build_model(job.cf, load_manifest(job.data_dir), train_rows, job.seed).to(device)
    state = read_state(job.checkpoint, job.key)
    logger = RunLogger(
        job.folder,
        is_main=train.get_context().get_world_rank() == 0,
        tensorboard=job.tensorboard,
        progress_bar=False,
        start_step=state[1].epoch if state else 0,
        total_steps=job.cf.num_epochs,
    )

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        logger.log(epoch, {name.replace("_", "/", 1): value for name, value in metrics.items()})

    train_cf(
        model,
        train_rows.to(device),
        valid_rows.to(device),
        build_plan(job.cf, job.seed),
        checkpoint_path=job.checkpoint,
        key=job.key,
        on_epoch=on_epoch,
    )
    logger.close()


def build_model(cf: CfConfig, manifest: Manifest, train: Rows, seed: int) -> Any:
    """Return the untrained model that the settings ask for."""
    user_rows = torch.bincount(train.user_idx, minlength=manifest.num_users)
    item_rows = torch.bincount(train.item_idx, minlength=manifest.num_items)
    return MODEL_CLASSES[cf.model](
        user_rows, item_rows, embedding_dim=cf.embedding_dim, init_scale=cf.init_scale, seed=seed
    )


def build_plan(cf: CfConfig, seed: int) -> TrainingPlan:
    """Return the trainer's settings."""
    return TrainingPlan(
        learning_rate=cf.learning_rate,
        weight_decay=cf.weight_decay,
        global_batch_size=cf.global_batch_size,
        num_epochs=cf.num_epochs,
        select_metric=cf.select_metric,
        early_stop_patience=cf.early_stop_patience,
        checkpoint_every_epochs=cf.checkpoint_every_epochs,
        seed=seed,
    )


def load_rows(data_dir: Path, split: str) -> Rows:
    """Load the labelled pairs of a split, sampled negatives included, sorted by user."""
    columns = load_interactions(data_dir, ["user_idx", "item_idx", "label"], split)
    return Rows.from_arrays(columns["user_idx"], columns["item_idx"], columns["label"])


@contextmanager
def _show_progress(job: Job, enabled: bool) -> Iterator[None]:
    """Show how far the workers are, from the log that the first one writes: they have no terminal."""
    done = threading.Event()

    def follow() -> None:
        with tqdm(total=job.cf.num_epochs, desc="cf", unit="epoch", leave=False) as bar:
            while not done.wait(_POLL_SECONDS):
                lines = read_metrics(job.folder / "metrics.jsonl")
                if lines:
                    bar.set_postfix(
                        {name: f"{lines[-1][name]:.4f}" for name in SHOWN if name in lines[-1]}, refresh=False
                    )
                    bar.update(lines[-1]["step"] - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if enabled:
            thread.join()


def _export(job: Job) -> dict[str, Any]:
    """Write the model with the best weights and return the summary, without fingerprint."""
    state = read_state(job.checkpoint, job.key)
    if state is None:
        raise LaunchError(f"{job.checkpoint} was not written: do all nodes share {job.folder}?")
    tensors, progress = state
    manifest = load_manifest(job.data_dir)
    splits = {split: load_rows(job.data_dir, split) for split in ("train", "valid", "test")}
    model = build_model(job.cf, manifest, splits["train"], job.seed)
    model.load_state_dict(take_group(tensors, "best"))
    content_hash = save_cf_model(job.folder / FILE_NAME, model, manifest)
    summary = summarize(model, job.data_dir, manifest, splits, progress, job.cf.num_epochs)
    return {"model": job.cf.model, "num_workers": job.cf.num_workers, **summary, "content_hash": content_hash}
