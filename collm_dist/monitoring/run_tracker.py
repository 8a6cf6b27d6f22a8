"""Tracker: sends what a run writes to its directory to an MLflow server, from a thread of its own.

The files are the queue: ``metrics.jsonl`` of each step that trains, the report, the promotion. A server that does not
answer costs the run nothing, and gets what it missed later, at the latest when the same command runs again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from collm_dist.config import Config
from collm_dist.config.loader import dump_config
from collm_dist.errors import ArtifactError, CollmError, ConfigError, is_interruption
from collm_dist.monitoring.mlflow_run import MlflowRun, Point
from collm_dist.monitoring.run_log import read_metrics
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.fingerprints import flatten_config
from collm_dist.runs.local_paths import PathRemover, shorten_path
from collm_dist.runs.promotion import RECORD, find_pointer
from collm_dist.runs.run_dir import STEPS, RunDir, Step
from collm_dist.storage import join_uri

logger = logging.getLogger(__name__)

KEY_FILE = "mlflow.json"
_TRAINING_STEPS: tuple[Step, ...] = ("cf", "stage1", "stage2")
_POLL_S, _MAX_POLL_S = 5.0, 60.0
# Longest wait at the end of a run: for a server that has answered so far, and for any other.
_END_S, _END_DOWN_S = 15.0, 3.0
_REPORT_HASH, _REPORT_NUMBER = "collm_dist.report", "collm_dist.report_number"
# Columns of the report's rows that are metrics; with the ends of their intervals.
_METRIC = re.compile(r"(auc|uauc|logloss|(ndcg|hr)@[0-9]+)(_low|_high)?")
# Inode, bytes and time of the last change of a file.
_State = tuple[int, int, int] | None


def check_tracker(config: Config) -> None:
    """Check that the library of ``monitoring.mlflow`` is installed, if that is set.

    Raises:
        ConfigError: it is missing.
    """
    if config.monitoring.mlflow.tracking_uri is not None and find_spec("mlflow") is None:
        raise ConfigError(
            "monitoring.mlflow.tracking_uri: is set, but MLflow's client is not installed; "
            "pip install 'collm-dist[mlflow]', or remove the setting"
        )


@contextmanager
def track_run(
    config: Config, run_dir: RunDir, force: Sequence[Step], begun: Collection[Step] = (), *, is_owner: bool
) -> Iterator[None]:
    """Send what the run writes during the block to ``monitoring.mlflow``, if that is set.

    No fault of the server ends or delays the block; at its end it waits seconds at most.

    Args:
        config, run_dir: the experiment; its settings are accepted.
        force: steps that are redone. If one of them trains, a new MLflow run begins.
        begun: steps whose redo was interrupted, see ``track_redo``. If there are any, their MLflow run goes on.
        is_owner: whether this process took the run's lock; no other process of the run sends anything.

    Raises:
        ConfigError: see ``check_tracker``.
    """
    check_tracker(config)
    if not is_owner or config.monitoring.mlflow.tracking_uri is None:
        yield
        return
    tracker = RunTracker(config, run_dir, force, begun)
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except CollmError as error:
        status = "KILLED" if is_interruption(error) else status
        raise
    finally:
        tracker.close(status)


class RunTracker:
    """Thread that compares a run's files with its MLflow run and sends what is missing there."""

    def __init__(self, config: Config, run_dir: RunDir, force: Sequence[Step], begun: Collection[Step] = ()) -> None:
        """Start the thread; see ``track_run``."""
        self._config, self._settings, self._run_dir = config, config.monitoring.mlflow, run_dir
        redone = STEPS[min(map(STEPS.index, force)) :] if force else ()
        self._is_new = not begun and any(step in _TRAINING_STEPS for step in redone)
        # Files of an earlier training, until its successor replaces them.
        self._old = {path: _read_state(path) for step in redone if step not in begun for path in self._list_files(step)}
        self._seen: dict[str, object] = {}
        self._sent: dict[Step, set[tuple[str, int]]] = {}
        self._times_ms: dict[tuple[str, int], int] = {}
        self._run: MlflowRun | None = None
        self._is_up, self._has_warned, self._status = True, False, "FAILED"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracker", daemon=True)
        self._thread.start()

    def close(self, status: str) -> None:
        """Send what is missing and the end: FINISHED, FAILED or KILLED. Waits seconds at most."""
        self._status = status
        self._stop.set()
        self._thread.join(_END_S if self._is_up else _END_DOWN_S)
        if self._thread.is_alive():
            self._warn("no answer in time")

    def _follow(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            self._is_up = self._try(self._send)
            wait_s = _POLL_S if self._is_up else min(max(2 * wait_s, _POLL_S), _MAX_POLL_S)
        if self._try(self._send):
            self._try(lambda run: run.end(self._status))

    def _try(self, act: Callable[[MlflowRun], None]) -> bool:
        """Connect if necessary, act, and return whether that worked. Only the first failure is reported."""
        try:
            if self._run is None:
                self._run = self._connect()
            act(self._run)
        except Exception as error:  # whatever happens to a tracker, training goes on
            lines = str(error).splitlines()
            self._warn(f"{type(error).__name__}: {lines[0][:300] if lines else ''}")
            return False
        return True

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            logger.warning(
                "monitoring.mlflow: %s did not accept the run's values (%s). The run continues; missing values "
                "are sent once the server answers, or when the same command runs again",
                self._settings.tracking_uri, reason,
            )  # fmt: skip
        self._has_warned = True

    def _connect(self) -> MlflowRun:
        key, uri = self._read_key(), self._settings.tracking_uri
        assert uri is not None
        run = MlflowRun(uri, self._settings.experiment, key=key, name=self._run_dir.path.absolute().name)
        flat = flatten_config(self._config).items()
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat}
        run.log_params({name: shorten_path(text) for name, text in texts.items()})
        run.set_tags({"run.dir": str(self._run_dir.path.absolute())})
        self._sent = {step: run.read_points(f"{step}/") for step in _TRAINING_STEPS}
        return run

    def _read_key(self) -> str:
        """Return the key of this training's MLflow run, which outlives kills; a training from the start has its own."""
        path = self._run_dir.path / KEY_FILE
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            key = json.loads(path.read_text(encoding="utf-8"))["key"]
            if not self._is_new and re.fullmatch(r"[0-9a-f]{32}", key):
                return str(key)
        key = uuid.uuid4().hex
        write_json(path, {"key": key})
        self._is_new = False
        return key

    def _send(self, run: MlflowRun) -> None:
        for step in _TRAINING_STEPS:
            self._send_metrics(run, step)
        report = self._read_record("eval")
        if report is not None:
            self._send_report(run, report)
            self._send_model(run, report)

    def _list_files(self, step: Step) -> list[Path]:
        return [self._run_dir.step_dir(step) / "metrics.jsonl", self._run_dir.record_path(step)]

    def _find_state(self, path: Path) -> _State:
        """Return the state of a file; None if it is missing, or of a training that is being redone."""
        state = _read_state(path)
        return None if path in self._old and self._old[path] == state else state

    def _read_record(self, step: Step) -> dict[str, Any] | None:
        """Return the record of a step; None if it is not done, or being redone."""
        if self._find_state(self._run_dir.record_path(step)) is None:
            return None
        with suppress(ArtifactError):  # being replaced; a damaged record is the step's own business
            return self._run_dir.read_record(step)
        return None

    def _send_metrics(self, run: MlflowRun, step: Step) -> None:
        path = self._run_dir.step_dir(step) / "metrics.jsonl"
        state = self._find_state(path)
        if state is None or self._seen.get(step) == state:
            return
        sent, now_ms, points = self._sent[step], time.time_ns() // 10**6, {}
        for line in read_metrics(path):
            for tag, value in line.items():
                place = (name_metric(f"{step}/{tag}"), line["step"])
                if tag != "step" and isinstance(value, int | float) and place not in sent:
                    # A second attempt sends the same time, so that MLflow drops what it got at the first.
                    points[place] = Point(*place, float(value), self._times_ms.setdefault(place, now_ms))
        run.log_points(list(points.values()))
        sent.update(points)
        self._times_ms.clear()
        self._seen[step] = state

    def _send_report(self, run: MlflowRun, report: Mapping[str, Any]) -> None:
        if self._seen.get("report") == report["content_hash"]:
            return
        tags, folder = run.read_tags(), self._run_dir.step_dir("eval")
        if tags.get(_REPORT_HASH) != report["content_hash"]:
            number = int(tags.get(_REPORT_NUMBER, "0")) + 1
            time_ms = self._run_dir.record_path("eval").stat().st_mtime_ns // 10**6
            metrics = list_report_metrics(report)
            run.log_points([Point(name, number, value, time_ms) for name, value in metrics.items()])
            remover = PathRemover(self._config, self._run_dir)
            run.log_text(dump_config(remover.clean_config(self._config)), "config.yaml")
            run.log_text(json.dumps(remover.clean(dict(report)), indent=1), "report/report.json")
            for name in ("report.md", "calibration.csv", *report.get("plots", ())):
                if (folder / name).is_file():
                    run.log_file(folder / name, "report")
            run.set_tags({_REPORT_NUMBER: str(number), _REPORT_HASH: report["content_hash"]})
        self._seen["report"] = report["content_hash"]

    def _send_model(self, run: MlflowRun, report: Mapping[str, Any]) -> None:
        """Register the evaluated model; its alias follows the pointer that promotions move."""
        settings, stage2, decision = self._settings, self._read_record("stage2"), self._read_decision(report)
        if settings.registered_model is None or stage2 is None:
            return
        is_in_use = Path(os.path.realpath(find_pointer(self._config))) == self._run_dir.path.resolve()
        is_promoted = is_in_use and decision.get("state") == "promoted"
        state = (stage2["content_hash"], is_promoted, decision)
        if self._seen.get("model") == state:
            return
        path, uri = self._run_dir.path.absolute(), self._config.run.publish_to
        reference = {"run.dir": str(path), **({"published": join_uri(uri, path.name)} if uri is not None else {})}
        run.log_text(json.dumps({**reference, "content_hash": stage2["content_hash"]}, indent=1), "model/run.json")
        tags = {name: str(decision[key]) for name, key in (("promotion", "state"), ("reason", "reason")) if decision}
        version = run.register(settings.registered_model, "model", stage2["content_hash"], {**reference, **tags})
        if is_promoted:
            run.set_alias(settings.registered_model, settings.alias, version)
        self._seen["model"] = state

    def _read_decision(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return the promotion decision about a report, empty without a rule or before the decision."""
        with suppress(OSError, ValueError, RecursionError):
            decision = json.loads((self._run_dir.path / RECORD).read_text(encoding="utf-8"))
            if isinstance(decision, dict) and decision.get("report") == report["content_hash"]:
                return {key: decision.get(key) for key in ("state", "reason")}
        return {}


def name_metric(tag: str) -> str:
    """Return MLflow's name for a tag: it has no @."""
    return tag.replace("@", "-at-")


def list_report_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a report's rows over all users and items, and of its comparisons, by MLflow's name."""
    named = [(row["model"], row) for row in report["rows"]]
    named += [(f"{row['model']}-less-{row['versus']}", row) for row in report["differences"]]
    return {
        name_metric(f"report/{row['split']}/{name}/{key}"): float(value)
        for name, row in named
        for key, value in row.items()
        if row["slice"] == "all" and isinstance(value, float) and _METRIC.fullmatch(key)
    }


def _read_state(path: Path) -> _State:
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None
