"""Settings of logs, progress and profiles."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from collm_dist.config.section import Section, holds_credentials, operational

MAX_PROFILED_STEPS = 50


class MlflowConfig(Section):
    """An MLflow server that gets the run. Its credentials come from the environment (MLFLOW_TRACKING_USERNAME, ...)."""

    tracking_uri: str | None = operational(
        None,
        "http:// or https:// URI of an MLflow server that gets settings, metrics, report and model; default: nothing "
        "is sent. Needs the extra mlflow. Credentials come from the environment: MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
    )
    experiment: str = operational("collm-dist", "MLflow experiment of the run; made if missing.", min_length=1)
    registered_model: str | None = operational(
        None,
        "Model in MLflow's registry of which an evaluated run becomes a version that refers to the run; default: none.",
        pattern=r"^[^/:%\x00-\x1f']{1,200}$",
    )
    alias: str = operational(
        "production",
        "Alias of the registered model that a promotion moves to the run's version.",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]{1,99}$",
    )

    @field_validator("alias")
    @classmethod
    def _check_alias(cls, value: str) -> str:
        if re.fullmatch(r"latest|[vV][0-9]+", value):
            raise ValueError(f"'{value}' means a version to MLflow; choose another name, such as production")
        return value

    @field_validator("tracking_uri")
    @classmethod
    def _check_uri(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if holds_credentials(value) or "?" in value:  # the value is not shown
            raise ValueError(
                "credentials and options in the URI would be written to records and logs: write the address alone, "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the "
                "environment"
            )
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", value):
            raise ValueError(f"{value!r:.60} is not the address of a server, such as http://mlflow.example.org:5000")
        return value.rstrip("/")


class MonitoringConfig(Section):
    """Logs and progress of a run."""

    log_every_steps: int = operational(10, "Steps between logged points.", ge=1)
    tensorboard: bool = operational(True, "Write TensorBoard files.")
    progress_bar: bool = operational(True, "Show progress bars on the first process.")
    projector_items: int = operational(
        1000,
        "Items whose vectors stage 2 writes for TensorBoard's projector, the most frequent first; 0: none.",
        ge=0,
        le=100_000,
    )
    profile_steps: tuple[int, int] | None = operational(
        None,
        "First and last step, also written 10-12, that process 0 of each stage traces with the profiler.",
    )
    prometheus_dir: str | None = operational(
        None,
        "Folder, as an absolute path, of text files for node exporter's textfile collector: the state of "
        "the run and its training metrics; default: none.",
    )
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig, description="An MLflow server that gets the run.")

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _parse_steps(cls, value: Any) -> Any:
        if value is None:
            return None
        text = "-".join(str(step) for step in value) if isinstance(value, list | tuple) else str(value)
        match = re.fullmatch(r" *([0-9]{1,12}) *- *([0-9]{1,12}) *", text)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last < first + MAX_PROFILED_STEPS:
            raise ValueError(
                f"{value!r:.60} is not a range of steps: write [10, 12] or 10-12, counted from 1, with at most "
                f"{MAX_PROFILED_STEPS} steps (a trace takes megabytes a step)"
            )
        return first, last

    @field_validator("prometheus_dir")
    @classmethod
    def _check_absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError(
                f"{value!r:.60} is not an absolute path; the processes of a run may start in different folders"
            )
        return value
