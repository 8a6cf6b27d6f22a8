"""A worker of a CF training: it fits a job's models; the first worker writes the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from collm_dist.cf.cross_fit import fit_job
from collm_dist.cf.fitting import OnEpoch
from collm_dist.cf.jobs import Job
from collm_dist.monitoring import (
    EPOCH_SECONDS,
    PEAK_MEMORY,
    RunLogger,
    TrainingTextfile,
    check_textfile_dir,
    measure_peak_gib,
)


@dataclass(frozen=True)
class LogTarget:
    """Destinations of a training log.

    Attributes:
        folder: gets ``metrics.jsonl`` and, if asked for, TensorBoard events.
        tensorboard: whether to write TensorBoard events.
        prometheus_dir: textfile-collector folder on the worker's node; None = no Prometheus metrics.
        run: name of the run in Prometheus metrics.
    """

    folder: Path
    tensorboard: bool
    prometheus_dir: str | None = None
    run: str = ""


def run_worker(
    job: Job, log: LogTarget, device: torch.device, rank: int, world_size: int, on_epoch: OnEpoch | None = None
) -> None:
    """Fit a job's models and log the last one. All workers of the job call this together.

    Args:
        job: models to fit.
        log: written by rank 0.
        device: device of this worker.
        rank, world_size: place of this worker among the job's workers.
        on_epoch: called with the metrics of each epoch of the last model, once the epoch is logged.

    Raises:
        CollmError: see ``fit_job``.
    """
    with _open_log(job, log, device, is_main=rank == 0) as log_epoch:

        def report(epoch: int, metrics: Mapping[str, float]) -> None:
            log_epoch(epoch, metrics)
            if on_epoch is not None:
                on_epoch(epoch, {name: value for name, value in metrics.items() if name != "seconds"})

        fit_job(job, device, rank, world_size, report)


def run_single_worker(job: Job, log: LogTarget, on_epoch: OnEpoch | None = None) -> None:
    """Fit a job's models in this process alone, on its GPU if it has one; see ``run_worker``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_worker(job, log, device, 0, 1, on_epoch)


@contextmanager
def _open_log(job: Job, log: LogTarget, device: torch.device, *, is_main: bool) -> Iterator[OnEpoch]:
    state = job.read_state("final")
    textfile = None
    if is_main and log.prometheus_dir is not None:
        check_textfile_dir(log.prometheus_dir)  # the folder must exist on this worker's node
        textfile = TrainingTextfile(Path(log.prometheus_dir), run=log.run, step="cf", total_steps=job.cf.num_epochs)
    logger = RunLogger(
        log.folder,
        is_main=is_main,
        tensorboard=log.tensorboard,
        progress_bar=False,
        start_step=state.progress.epoch if state else 0,
        total_steps=job.cf.num_epochs,
        textfile=textfile,
    )

    def log_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        values = {name.replace("_", "/", 1): value for name, value in metrics.items() if name != "seconds"}
        cost = {EPOCH_SECONDS: metrics["seconds"], PEAK_MEMORY: measure_peak_gib(device)}
        logger.log(epoch, values | cost)

    yield log_epoch
    logger.close()
