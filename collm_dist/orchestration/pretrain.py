"""CF pretraining on Ray: one or several seeds, 1..N workers each, a restart where one dies, and the step's summary."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from tqdm import tqdm

from collm_dist.cf.batches import take_before
from collm_dist.cf.fitting import Job, OnEpoch, build_untrained, compute_fold_starts, fit
from collm_dist.cf.model_files import FILE_NAME, ModelHeader, load_model, name_fold_file, take_sample, write_model
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.models.registry import check_arguments, check_tuning, list_arguments
from collm_dist.cf.models.vector_table import read_vectors, read_width
from collm_dist.cf.optimizer import Optimizers
from collm_dist.cf.sharded_checkpoint import Progress, read_state, save_state
from collm_dist.cf.trainer import check_metric, copy_weights
from collm_dist.cf.user_shards import load_worker_data, number_globally
from collm_dist.config import CfConfig, Config
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import CollmError, DataError, LaunchError
from collm_dist.evaluation.cf_summary import print_summary, summarize
from collm_dist.monitoring import (
    EPOCH_SECONDS,
    PEAK_MEMORY,
    TRAIN_LOSS,
    VALID_AUC,
    RunLogger,
    TrainingTextfile,
    check_textfile_dir,
    measure_peak_gib,
    read_metrics,
)
from collm_dist.orchestration.cluster import connect_ray, run_tasks
from collm_dist.runs.atomic_files import compute_json_hash, write_json
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.previous_run import find_previous_file
from collm_dist.runs.run_dir import RunDir

# A run with more lost workers than this gives up; its last checkpoint stays.
MAX_FAILURES = 3
SHOWN = (TRAIN_LOSS, VALID_AUC)
_POLL_SECONDS = 0.5


def run_pretrain(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the CF step, unless it is done, and return its summary.

    Training that was interrupted, by a lost worker or as a whole, goes on from its last checkpoint.

    Args:
        config: the experiment.
        run_dir: whose data step is done.
        force: redo it from the start even if it is done.

    Raises:
        ArtifactError: the data step is not done, or this one was done with something else.
        ConfigError: there is no such model.
        DataError: the validation rows cannot tell which epoch is best, or given vectors are wrong.
        LaunchError: too few CPUs, or workers kept dying.
    """
    fingerprint = compute_step_fingerprint(config, run_dir, "cf")
    if not force and is_step_current(run_dir, "cf", fingerprint):
        print(f"cf: done already ({run_dir.step_dir('cf')})")
        return run_dir.read_record("cf")
    folder, data_dir = run_dir.step_dir("cf").absolute(), run_dir.step_dir("data").absolute()
    manifest = load_manifest(data_dir)
    check_inputs(config.cf, data_dir)
    if config.stage2.train_cf:
        check_tuning(config.cf.model)
    run_dir.withdraw("cf")
    checkpoints = folder / "checkpoints"
    if force:
        shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    jobs = _plan_jobs(config, data_dir, manifest, checkpoints, compute_json_hash(fingerprint))
    if config.cf.model == "none":
        _save_untrained(jobs[0], manifest)
        record: dict[str, Any] = {
            "model": "none",
            "metrics": {},
            "fold_starts": [],
            "content_hash": export_models(jobs[0], folder, manifest),
            "fingerprint": fingerprint,
        }
        write_json(run_dir.record_path("cf"), record)
        shutil.rmtree(checkpoints)
        print("cf: no collaborative model (cf.model: none); stage 2 learns a token for each user and item")
        return record
    if any(job.read_result() is None for job in jobs):
        with connect_ray(config.cluster), _show_progress(folder, config):
            _fit_on_ray(jobs, folder, config)
    content_hash = export_models(jobs[0], folder, manifest)
    results = {job.seed: job.read_result() for job in jobs}
    if None in results.values():
        raise LaunchError(f"{checkpoints}: results are missing: do all nodes share {folder}?")
    summary = summarize(config.cf, data_dir, manifest, {seed: one for seed, one in results.items() if one})
    summary |= {"content_hash": content_hash, "fingerprint": fingerprint, "fold_starts": list(jobs[0].fold_starts)}
    write_json(run_dir.record_path("cf"), summary)
    shutil.rmtree(checkpoints)
    print_summary(summary, run_dir.record_path("cf"))
    return summary


def _save_untrained(job: Job, manifest: Manifest) -> None:
    """Leave the state of a training that makes no pass: initial rows for the users and items of the training rows."""
    data = load_worker_data(job.data_dir, manifest)
    model = build_untrained(job.cf, manifest, data.users, number_globally(data.splits["train"]), job.seed)
    optimizers = Optimizers(model, job.cf.learning_rate)
    folder = job.checkpoints / job.name_part(1)
    save_state(folder, job.key, model, optimizers, copy_weights(model), Progress(finished=True), data.users)


def check_inputs(cf: CfConfig, data_dir: Path) -> None:
    """Refuse, before work starts, what cannot be trained or selected."""
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
                raise DataError(f"cf: {path} has a vector for none of the data's ids, such as {ids[0]!r}")


def _plan_jobs(config: Config, data_dir: Path, manifest: Manifest, checkpoints: Path, key: str) -> list[Job]:
    """Return one job a seed; the first one's vectors are read later, so it alone fits the folds."""
    starts: tuple[int, ...] = ()
    if config.cf.cross_fit != "off":
        starts = compute_fold_starts(data_dir, manifest, config.cf.cross_fit)
    jobs = []
    for number, seed in enumerate(config.cf.seeds or (config.run.seed,)):
        folder = checkpoints / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        folds = () if number else starts
        jobs.append(Job(data_dir, folder, key, config.cf, seed, folds, previous=find_previous_file(config, "cf")))
    return jobs


def _fit_on_ray(jobs: Sequence[Job], folder: Path, config: Config) -> None:
    """Fit what is not done: single workers side by side as Ray tasks, several workers one job after the other."""
    num_workers, resources = config.cf.num_workers, ray.cluster_resources()
    if resources.get("CPU", 0) < num_workers:
        raise LaunchError(f"cf.num_workers: {num_workers} workers need a CPU each, Ray has "
                          f"{resources.get('CPU', 0):.0f}; lower it or raise cluster.ray_num_cpus")  # fmt: skip
    pending = [job for job in jobs if job.read_result() is None]
    settings = [
        {"job": job, "log": folder if job is jobs[0] else folder / "seeds" / str(job.seed),
         "tensorboard": config.monitoring.tensorboard,
         "textfile": (config.monitoring.prometheus_dir, config.run.dir) if job is jobs[0] else None} for job in pending
    ]  # fmt: skip
    if num_workers > 1:
        for one in settings:
            _fit_with_ray_train(one, num_workers, use_gpu=resources.get("GPU", 0) >= num_workers)
        return
    run_tasks(
        fit_alone,
        [(one,) for one in settings],
        description="cf",
        parallelism=len(jobs),
        num_gpus=1 if resources.get("GPU", 0) >= 1 else 0,
        progress_bar=config.monitoring.progress_bar and len(jobs) > 1,
    )


def _fit_with_ray_train(settings: Mapping[str, Any], num_workers: int, *, use_gpu: bool) -> None:
    from ray import train  # late: it takes seconds to import, and a finished step needs none of it
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    storage = settings["job"].checkpoints / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    trainer = TorchTrainer(
        fit_together,
        train_loop_config=dict(settings),
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


def fit_together(settings: Mapping[str, Any]) -> None:
    """Train on one of several Ray Train workers; the first one writes the log."""
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    with _open_log(settings, device, is_main=rank == 0) as on_epoch:
        fit(settings["job"], device, rank, world_size, on_epoch)


def fit_alone(settings: Mapping[str, Any], report: OnEpoch | None = None) -> None:
    """Train as a single Ray task.

    Args:
        settings: job; log, the folder of its log; tensorboard, whether to write that too; textfile, folder of one and
            the run's name, or nothing.
        report: called after each epoch, once it is logged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _open_log(settings, device, is_main=True) as log_epoch:

        def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
            log_epoch(epoch, metrics)
            if report is not None:
                report(epoch, metrics)

        fit(settings["job"], device, 0, 1, on_epoch)


@contextmanager
def _open_log(settings: Mapping[str, Any], device: torch.device, *, is_main: bool) -> Iterator[OnEpoch]:
    job: Job = settings["job"]
    state = job.read_part("final")
    textfile, (prometheus_dir, run) = None, settings.get("textfile") or (None, "")
    if is_main and prometheus_dir is not None:
        check_textfile_dir(prometheus_dir)  # on this node
        textfile = TrainingTextfile(Path(prometheus_dir), run=run, step="cf", total_steps=job.cf.num_epochs)
    logger = RunLogger(
        settings["log"],
        is_main=is_main,
        tensorboard=settings["tensorboard"],
        progress_bar=False,
        start_step=state.progress.epoch if state else 0,
        total_steps=job.cf.num_epochs,
        textfile=textfile,
    )

    started = time.perf_counter()

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        nonlocal started
        now = time.perf_counter()
        cost = {EPOCH_SECONDS: now - started, PEAK_MEMORY: measure_peak_gib(device)}
        logger.log(epoch, {name.replace("_", "/", 1): value for name, value in metrics.items()} | cost)
        started = now

    yield on_epoch
    logger.close()


@contextmanager
def _show_progress(folder: Path, config: Config) -> Iterator[None]:
    """Show how far the first seed is, from the log that its worker writes: workers have no terminal."""
    done = threading.Event()

    def follow() -> None:
        with tqdm(total=config.cf.num_epochs, desc="cf", unit="epoch", leave=False) as bar:
            while not done.wait(_POLL_SECONDS):
                lines = read_metrics(folder / "metrics.jsonl")
                if lines:
                    bar.set_postfix(
                        {name: f"{lines[-1][name]:.4f}" for name in SHOWN if name in lines[-1]}, refresh=False
                    )
                    bar.update(lines[-1]["step"] - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    enabled = config.monitoring.progress_bar and len(config.cf.seeds) < 2
    if enabled:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if enabled:
            thread.join()


def _load_predecessor(job: Job) -> TrainableCfModel | None:
    """Return the model of the run that this one extends, if the vectors have the same width."""
    if job.previous is None:
        return None
    model = load_model(job.previous)[1]
    return model if model.dim == job.cf.embedding_dim else None


def export_models(job: Job, folder: Path, manifest: Manifest) -> str:
    """Write the models that the slots read from a job that is done, and return the hash of them all."""
    for old in folder.glob("*.safetensors"):
        old.unlink()
    data = load_worker_data(job.data_dir, manifest)
    hashes: list[str] = []
    previous = _load_predecessor(job)
    for fold, name in enumerate(job.list_parts(), start=1):
        state = read_state(job.checkpoints / name, job.key)
        if state is None:
            raise LaunchError(f"{job.checkpoints / name} was not written: do all nodes share {folder}?")
        is_final = name == "final"
        train = data.splits["train"] if is_final else take_before(data.splits["train"], job.fold_starts[fold - 1])
        arguments = list_arguments(job.cf, manifest.max_history_length, job.seed)
        if job.cf.model == "table":
            arguments["embedding_dim"] = read_width(Path(str(job.cf.item_vectors)))
        header = ModelHeader.from_manifest(
            manifest, job.cf.model, arguments, job.fold_starts if is_final else (), job.cf.feedback
        )
        users, *sample = take_sample(data.users, train, arguments["history_length"])
        sample = [torch.full_like(users, -1) if job.fold_starts else users, *sample]
        path = folder / (FILE_NAME if is_final else name_fold_file(fold))
        hashes.append(write_model(path, state, header, with_users=is_final, previous=previous, sample=sample))
        previous = load_model(path)[1] if job.fold_starts else None
    return compute_json_hash(hashes)
