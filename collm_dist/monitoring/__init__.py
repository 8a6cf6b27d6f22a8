"""Monitoring: TensorBoard, metrics.jsonl, progress bar, peak memory, profiler traces, Prometheus text files, MLflow.

Only numbers that are on the host already are logged. Nothing here waits for a GPU, except the end of a profiler trace.
"""

from collm_dist.monitoring.memory import PeakMeter, measure_peak_gib, measure_total_gib
from collm_dist.monitoring.profiling import StepProfiler
from collm_dist.monitoring.projector import VectorSet, write_projector
from collm_dist.monitoring.prometheus import StateTextfile, TrainingTextfile, check_textfile_dir
from collm_dist.monitoring.report_log import RunSettings, log_report
from collm_dist.monitoring.run_log import RunLogger, read_metrics
from collm_dist.monitoring.run_tracker import check_tracker, track_run
from collm_dist.monitoring.tags import (
    DATA_WAIT_SHARE,
    EPOCH_SECONDS,
    GRAD_NORM,
    LEARNING_RATE,
    PEAK_MEMORY,
    SAMPLES_PER_SECOND,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TOTAL_MEMORY,
    TRAIN_LOSS,
    TRAIN_LOSS_BCE,
    TRAIN_LOSS_LISTWISE,
    TRAIN_LOSS_PAIRWISE,
    VALID_AUC,
    VALID_HR,
    VALID_LOGLOSS,
    VALID_NDCG,
    VALID_UAUC,
)

__all__ = [
    "DATA_WAIT_SHARE",
    "EPOCH_SECONDS",
    "GRAD_NORM",
    "LEARNING_RATE",
    "PEAK_MEMORY",
    "SAMPLES_PER_SECOND",
    "STEP_SECONDS",
    "TOKENS_PER_SECOND",
    "TOTAL_MEMORY",
    "TRAIN_LOSS",
    "TRAIN_LOSS_BCE",
    "TRAIN_LOSS_LISTWISE",
    "TRAIN_LOSS_PAIRWISE",
    "VALID_AUC",
    "VALID_HR",
    "VALID_LOGLOSS",
    "VALID_NDCG",
    "VALID_UAUC",
    "PeakMeter",
    "RunLogger",
    "RunSettings",
    "StateTextfile",
    "StepProfiler",
    "TrainingTextfile",
    "VectorSet",
    "check_textfile_dir",
    "check_tracker",
    "log_report",
    "measure_peak_gib",
    "measure_total_gib",
    "read_metrics",
    "track_run",
    "write_projector",
]
