"""Run on an MLflow server, found again by a key. Values that the server already has are not sent again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Limits of MLflow's REST API for one request.
_MAX_METRICS, _MAX_PARAMS = 1000, 100
_KEY = "collm_dist.key"


@dataclass(frozen=True)
class Point:
    """A value of a metric.

    Attributes:
        name: name in MLflow.
        step: optimizer step, epoch, or number of the report.
        value: the value.
        time_ms: milliseconds since 1970. MLflow drops a point that it has with the same time, step and value.
    """

    name: str
    step: int
    value: float
    time_ms: int


class MlflowRun:
    """Client of one run. Methods pass on the errors of MLflow's client."""

    def __init__(self, tracking_uri: str, experiment: str, *, key: str, name: str) -> None:
        """Find the run, or make it.

        Args:
            tracking_uri: http(s) URI of the server; credentials come from MLflow's environment variables.
            experiment: name; made if missing.
            key: tag by which the run is found again.
            name: name of a new run.
        """
        # MLflow reports its use to its makers, unless it is told not to before it is imported.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        # The caller tries again by itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self._client.search_runs([experiment_id], f"tags.`{_KEY}` = '{key}'", max_results=1)
        run = runs[0] if runs else self._client.create_run(experiment_id, run_name=name, tags={_KEY: key})
        self.run_id: str = run.info.run_id
        self._artifact_uri: str = run.info.artifact_uri
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")

    def read_tags(self) -> dict[str, str]:
        """Return the run's tags."""
        return dict(self._client.get_run(self.run_id).data.tags)

    def read_points(self, prefix: str) -> set[tuple[str, int]]:
        """Return (name, step) of all points whose name starts with a prefix."""
        names = [name for name in self._client.get_run(self.run_id).data.metrics if name.startswith(prefix)]
        return {(name, point.step) for name in names for point in self._client.get_metric_history(self.run_id, name)}

    def log_points(self, points: Sequence[Point]) -> None:
        """Send points in as few requests as MLflow allows."""
        from mlflow.entities import Metric

        for first in range(0, len(points), _MAX_METRICS):
            part = points[first : first + _MAX_METRICS]
            metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in part]
            self._client.log_batch(self.run_id, metrics=metrics)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Send the parameters that the run lacks; MLflow's parameters cannot change."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        missing = [Param(name, value) for name, value in params.items() if name not in known]
        for first in range(0, len(missing), _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=missing[first : first + _MAX_PARAMS])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, in their order."""
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value)

    def log_file(self, path: Path, folder: str) -> None:
        """Upload a file to a folder of the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Upload a text as an artifact."""
        self._client.log_text(self.run_id, text, name)

    def register(self, model: str, folder: str, content_hash: str, tags: Mapping[str, str]) -> str:
        """Return the version of a registered model that stands for a model of this run; made if missing.

        Args:
            model: name of the registered model; made if missing.
            folder: folder of the run's artifacts that describes the model.
            content_hash: hash of the model, by which its version is found again.
            tags: tags of the version, set in any case.
        """
        from mlflow.exceptions import MlflowException

        tags = {"content_hash": content_hash, **tags}
        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = self._client.search_model_versions(f"name='{model}' and run_id='{self.run_id}'")
        for version in found:
            if version.tags.get("content_hash") == content_hash:
                for name, value in tags.items():
                    if version.tags.get(name) != value:
                        self._client.set_model_version_tag(model, version.version, name, value)
                return str(version.version)
        source = f"{self._artifact_uri}/{folder}"
        created = self._client.create_model_version(model, source, self.run_id, tags=tags, await_creation_for=0)
        return str(created.version)

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Let an alias of a registered model name a version."""
        if str(self._client.get_registered_model(model).aliases.get(alias)) != version:
            self._client.set_registered_model_alias(model, alias, version)

    def end(self, status: str) -> None:
        """Set the end of the run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)
