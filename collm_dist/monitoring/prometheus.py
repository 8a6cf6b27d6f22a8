"""Prometheus gauges as text files for node exporter's textfile collector: no port, nothing to wait for.

A run writes one file with its state and one for each step that trains, each atomically. Every gauge has the label
``run``; training gauges also have ``step``.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from collm_dist.errors import ConfigError
from collm_dist.monitoring import tags

logger = logging.getLogger(__name__)

STATES = ("running", "done", "promoted", "rejected", "failed", "interrupted")

# Tag: name, help, factor to Prometheus base units.
_TRAINING_GAUGES = {
    tags.TRAIN_LOSS: ("collm_training_loss", "Mean loss of the last log window.", 1),
    tags.TRAIN_LOSS_BCE: ("collm_training_loss_bce", "Cross-entropy term of the training loss.", 1),
    tags.TRAIN_LOSS_PAIRWISE: (
        "collm_training_loss_pairwise",
        "Pairwise term of the training loss, without weight.",
        1,
    ),
    tags.TRAIN_LOSS_LISTWISE: (
        "collm_training_loss_listwise",
        "Listwise term of the training loss, without weight.",
        1,
    ),
    tags.LEARNING_RATE: ("collm_training_learning_rate", "Learning rate of the last step.", 1),
    tags.GRAD_NORM: ("collm_training_grad_norm", "Gradient norm of the last step, before clipping.", 1),
    tags.SAMPLES_PER_SECOND: ("collm_training_samples_per_second", "Rows trained per second, over all processes.", 1),
    tags.TOKENS_PER_SECOND: ("collm_training_tokens_per_second", "Tokens trained per second on the first device.", 1),
    tags.STEP_SECONDS: ("collm_training_step_seconds", "Mean duration of a step in the last log window.", 1),
    tags.EPOCH_SECONDS: ("collm_training_epoch_seconds", "Duration of the last epoch.", 1),
    tags.DATA_WAIT_SHARE: ("collm_training_data_wait_ratio", "Share of time spent waiting for data.", 1),
    tags.PEAK_MEMORY: ("collm_memory_peak_bytes", "Peak memory of the first process so far.", 2**30),
    tags.TOTAL_MEMORY: ("collm_memory_total_bytes", "Total memory of the GPU, or of the machine.", 2**30),
    tags.VALID_AUC: ("collm_valid_auc", "AUC of the last validation.", 1),
    tags.VALID_UAUC: ("collm_valid_uauc", "UAUC of the last validation.", 1),
    tags.VALID_LOGLOSS: ("collm_valid_logloss", "Log-loss of the last validation.", 1),
    tags.VALID_NDCG: ("collm_valid_ndcg", "NDCG of the last validation.", 1),
    tags.VALID_HR: ("collm_valid_hr", "Hit rate of the last validation.", 1),
}


def check_textfile_dir(folder: str | None) -> None:
    """Create the folder of ``monitoring.prometheus_dir``.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"monitoring.prometheus_dir: '{folder}' cannot be created ({error.strerror}); name a writable "
            "folder, or null for no files"
        ) from None


def _name_run(run: str) -> str:
    """Return the name of a run in file names: its directory, with a hash of it if characters had to be replaced.

    Without the hash ``runs/a/b`` and ``runs-a-b`` would write the same files.
    """
    name = re.sub(r"[^\w.-]+", "-", run).strip("-")
    return name if name == run else f"{name}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


class _Textfile:
    """One file of gauges that share labels."""

    def __init__(self, folder: Path, run: str, step: str, labels: Mapping[str, str]) -> None:
        self._path = folder / f"{_name_run(run)}-{step}.prom"  # many runs may write into one folder
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._labels = {"run": run, **labels}
        self._has_warned = False

    def _set(self, name: str, text: str, value: float, **labels: str) -> None:
        labels = {**self._labels, **labels}
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, tuple(labels), registry=self._registry)
        self._gauges[name].labels(**labels).set(value)

    def _write(self) -> None:
        """Write the file. A failure is reported once and does not end the run."""
        try:
            write_to_textfile(str(self._path), self._registry)
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s cannot be written (%s); the run continues without it", self._path, error)
            self._has_warned = True


class TrainingTextfile(_Textfile):
    """Gauges of a step that trains, updated with each logged point."""

    def __init__(self, folder: Path, *, run: str, step: str, total_steps: int) -> None:
        """Name the step.

        Args:
            folder: existing folder.
            run: ``run.dir``.
            step: cf, stage1 or stage2.
            total_steps: most optimizer steps; for cf, most epochs.
        """
        super().__init__(folder, run, step, {"step": step})
        self._total_steps, self._last_step = total_steps, 0

    def restore(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Set the gauges to the logged points of an interrupted run, as read by ``read_metrics``, without writing."""
        for point in points:
            self._take(point["step"], {tag: value for tag, value in point.items() if isinstance(value, int | float)})

    def update(self, global_step: int, values: Mapping[str, float]) -> None:
        """Set the gauges of the known tags and write the file; a point of an earlier step than the last is ignored.

        The untrained model may be validated after the first steps, and is not the model whose state the gauges show.
        """
        if self._take(global_step, values):
            self._write()

    def _take(self, global_step: int, values: Mapping[str, float]) -> bool:
        """Set the gauges, and return whether the point is not of an earlier step."""
        if global_step < self._last_step:
            return False
        self._last_step = global_step
        self._set("collm_training_steps", "Optimizer steps, or epochs of the CF model, so far.", global_step)
        self._set("collm_training_planned_steps", "Most steps, or epochs, of the training.", self._total_steps)
        self._set("collm_training_updated_timestamp_seconds", "Time of the last update.", time.time())
        for tag, value in values.items():
            kind, _, cutoff = tag.partition("@")
            if kind in _TRAINING_GAUGES:
                name, text, factor = _TRAINING_GAUGES[kind]
                self._set(name, text, value * factor, **({"cutoff": cutoff} if cutoff else {}))
        return True


class StateTextfile(_Textfile):
    """Gauges of ``status.json``: state, step, restarts and times."""

    def __init__(self, folder: Path, *, run: str, steps: tuple[str, ...]) -> None:
        """Name the run and its steps; the folder must exist."""
        super().__init__(folder, run, "state", {})
        self._steps = steps

    def update(self, status: Mapping[str, Any]) -> None:
        """Write a status with state, step, restarts, exit_code, started_at and heartbeat_at (ISO 8601)."""
        for state in STATES:
            self._set("collm_run_state", "1 for the state of the run.", status["state"] == state, state=state)
        for step in self._steps:
            is_current = status["step"] == step
            self._set("collm_run_step", "1 for the current or last step.", is_current, step=step)
        self._set("collm_run_restarts", "Restarts of steps after lost processes.", status["restarts"])
        if status["exit_code"] is not None:
            self._set("collm_run_exit_code", "Exit code of the ended run.", status["exit_code"])
        for name, key in (("started", "started_at"), ("heartbeat", "heartbeat_at")):
            seconds = datetime.fromisoformat(status[key]).timestamp()
            self._set(f"collm_run_{name}_timestamp_seconds", f"Time: {key.replace('_', ' ')}.", seconds)
        self._write()
