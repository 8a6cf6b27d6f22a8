"""CF pretraining on Ray: one job per seed, 1..N workers per job, restart after a lost worker, the step's summary."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray

from collm_dist.cf.cross_fit import compute_fold_starts
from collm_dist.cf.fitting import save_untrained
from collm_dist.cf.jobs import Job, check_inputs, plan_jobs
from collm_dist.cf.model_export import export_models
from collm_dist.cf.models.registry import check_tuning
from collm_dist.cf.progress_bar import show_progress
from collm_dist.cf.worker import LogTarget, run_single_worker, run_worker
from collm_dist.config import Config
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import CollmError, LaunchError
from collm_dist.evaluation.cf_summary import print_summary, summarize
from collm_dist.orchestration.cluster import connect_ray, run_here, run_tasks
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import clear_unfinished, compute_json_hash
from collm_dist.runs.code_trust import keep_trust
from collm_dist.runs.file_hashes import hash_products
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.forced_redo import has_begun, note_begun
from collm_dist.runs.input_files import drop_times
from collm_dist.runs.run_dir import RunDir, clear_checkpoints

# A job that loses more workers than this fails; its last checkpoint stays.
MAX_FAILURES = 3


def run_pretrain(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the CF step, unless it is done, and return its summary.

    Interrupted training, by a lost worker or as a whole, resumes from its last checkpoint.

    Args:
        config: the experiment.
        run_dir: a run whose data step is done.
        force: redo the step from the start even if it is done; a redo that was interrupted resumes (``track_redo``).

    Raises:
        ArtifactError: the data step is not done, or this step was done with other inputs.
        ConfigError: the model's class or arguments are invalid.
        DataError: the validation rows do not define the selection metric, or given vectors are invalid.
        LaunchError: Ray has too few CPUs, or workers kept dying.
    """
    fingerprint = compute_step_fingerprint(config, run_dir, "cf")
    is_fresh = force and not has_begun(run_dir, "cf", fingerprint)
    if not is_fresh and is_step_current(run_dir, "cf", fingerprint):
        print(f"cf: done already ({run_dir.step_dir('cf')})")
        return run_dir.read_record("cf")
    folder, data_dir = run_dir.step_dir("cf").absolute(), run_dir.step_dir("data").absolute()
    manifest = load_manifest(data_dir)
    with show_phase("cf: checking settings and vectors"):
        check_inputs(config.cf, data_dir)
    if config.stage2.train_cf:
        check_tuning(config.cf.model)
    run_dir.withdraw("cf")
    checkpoints = folder / "checkpoints"
    if is_fresh:
        clear_checkpoints(checkpoints)
        note_begun(run_dir, "cf", fingerprint)
    checkpoints.mkdir(parents=True, exist_ok=True)
    fold_starts: tuple[int, ...] = ()
    if config.cf.cross_fit != "off":
        fold_starts = compute_fold_starts(data_dir, manifest, config.cf.cross_fit)
    jobs = plan_jobs(config, data_dir, checkpoints, compute_json_hash(drop_times(fingerprint)), fold_starts)
    if config.cf.model == "none":
        record = _export_id_tokens(jobs[0], folder, manifest)
    else:
        _train(jobs, folder, config)
        record = _summarize(jobs, folder, config, manifest)
    record["fingerprint"] = fingerprint
    record["files"] = hash_products(folder)
    run_dir.write_record("cf", record)
    keep_trust(config, run_dir, "cf")
    clear_checkpoints(checkpoints)
    if config.cf.model == "none":
        print("cf: no collaborative model (cf.model: none); stage 2 learns a token for each user and item")
    else:
        print_summary(record, run_dir.record_path("cf"))
    return record


def _export_id_tokens(job: Job, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Export untrained tables and return the record of the step."""
    save_untrained(job, manifest)
    content_hash = export_models(job, folder, manifest)
    return {"model": "none", "metrics": {}, "fold_starts": [], "content_hash": content_hash}


def _summarize(jobs: Sequence[Job], folder: Path, config: Config, manifest: Manifest) -> dict[str, Any]:
    """Export the first job's models and return the step's summary without its fingerprint."""
    with show_phase("cf: writing the model"):
        content_hash = export_models(jobs[0], folder, manifest)
    results: dict[int, dict[str, Any]] = {}
    for job in jobs:
        result = job.read_result()
        if result is None:
            raise LaunchError(f"{job.result_path} is missing: do all nodes share {folder}?")
        results[job.seed] = result
    with show_phase("cf: summary"):
        summary = summarize(config.cf, jobs[0].data_dir, manifest, results)
    return summary | {"content_hash": content_hash, "fold_starts": list(jobs[0].fold_starts)}


def _train(jobs: Sequence[Job], folder: Path, config: Config) -> None:
    """Train the jobs that are not done."""
    pending = [job for job in jobs if job.read_result() is None]
    if not pending:
        return
    has_bar = config.monitoring.progress_bar and len(config.cf.seeds) < 2  # of several seeds, run_tasks shows one
    folds = [jobs[0].checkpoints / name for name in jobs[0].list_models()[:-1]]
    progress = show_progress(folder / "metrics.jsonl", config.cf.num_epochs, folds) if has_bar else nullcontext()
    with clear_unfinished(folder), connect_ray(config.cluster), progress:
        _train_on_ray([(job, _choose_log(job, jobs, folder, config)) for job in pending], config, len(jobs))


def _choose_log(job: Job, jobs: Sequence[Job], folder: Path, config: Config) -> LogTarget:
    """Return the step's own log for the first seed, and a log below ``seeds`` for every other one."""
    monitoring = config.monitoring
    if job is jobs[0]:
        return LogTarget(folder, monitoring.tensorboard, monitoring.prometheus_dir, config.run.dir)
    return LogTarget(folder / "seeds" / str(job.seed), monitoring.tensorboard)


def _train_on_ray(tasks: Sequence[tuple[Job, LogTarget]], config: Config, num_jobs: int) -> None:
    """Train jobs of one worker side by side as Ray tasks, jobs of several workers one after the other."""
    num_workers, resources = config.cf.num_workers, ray.cluster_resources()
    if resources.get("CPU", 0) < num_workers:
        raise LaunchError(f"cf.num_workers: {num_workers} workers need a CPU each, Ray has "
                          f"{resources.get('CPU', 0):.0f}; lower it or raise cluster.ray_num_cpus")  # fmt: skip
    if num_workers > 1:
        for job, log in tasks:
            _train_on_ray_workers(job, log, num_workers, use_gpu=resources.get("GPU", 0) >= num_workers)
        return
    run_tasks(
        run_single_worker,
        tasks,
        description="cf",
        parallelism=num_jobs,
        num_gpus=1 if resources.get("GPU", 0) >= 1 else 0,
        progress_bar=config.monitoring.progress_bar and num_jobs > 1,
        memory_remedy="lower cluster.ray_num_cpus, so that fewer of cf.seeds train at once, or on a cluster raise "
        "cf.num_workers, so that each worker holds fewer users",
    )


def _train_on_ray_workers(job: Job, log: LogTarget, num_workers: int, *, use_gpu: bool) -> None:
    """Train one job on several Ray Train workers, restarted together after a worker is lost."""
    from ray import train  # late: it takes seconds to import, and a finished step does not need it
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    storage = job.checkpoints / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    trainer = TorchTrainer(
        run_here(_run_ray_worker),
        train_loop_config={"job": job, "log": log},
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
        raise LaunchError(f"cf: training failed on {num_workers} Ray workers ({error}); run the command again to "
                          "resume from the last checkpoint") from error  # fmt: skip
    finally:
        # Ray Train leaves its own handler in place, which would answer a later Ctrl-C with a dead cluster.
        signal.signal(signal.SIGINT, on_interrupt)


def _run_ray_worker(settings: Mapping[str, Any]) -> None:
    """Run one of several Ray Train workers; ``settings`` is the ``train_loop_config``."""
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    run_worker(settings["job"], settings["log"], get_device(), rank, world_size)
