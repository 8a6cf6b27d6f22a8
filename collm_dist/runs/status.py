"""``status.json``: what a run is doing, or how it ended, for whoever watches it (``ray job submit`` says 0 or 1)."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from collm_dist.cli import ErrorReport
from collm_dist.errors import CollmError, DiskError
from collm_dist.monitoring import StateTextfile
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import Step

logger = logging.getLogger(__name__)

REMEDIES = {
    "ConfigError": "correct the settings that the message names, then run the same command again",
    "DataError": "correct the input, or the settings that say how to read it, then run the same command again",
    "ArtifactError": "redo the step that the message names with --force STEP, or set run.dir to a new directory",
    "CheckpointError": "remove the checkpoint that the message names, or redo its stage with --force STEP",
    "DiskError": "make space or allow writing where the message says, then run the same command again",
    "WorkerLostError": "run the same command again; it goes on from the checkpoint",
    "LaunchError": "run the same command again once the cause is gone; what is done stays done",
    "NonFiniteError": "lower the learning rate of the stage, then run the same command again",
    "Preempted": "run the same command again; it goes on from the checkpoint",
    "KeyboardInterrupt": "run the same command again; it goes on from here",
}
# By hand, and by a scheduler that wants the machine.
INTERRUPTED_EXIT_CODES = (130, 75)
UNKNOWN_REMEDY = "this is a fault of the program: report it with the traceback"


class RunStatus:
    """The state of one run, in a file that is always whole.

    Fields: state (running, done, promoted or rejected, failed, interrupted), step, error (class), exit_code, retryable
    (whether the same command can succeed without a change), message, remedy, restarts (of steps whose processes were
    stopped or lost; while the run is at work, error and message are those of the last), host, pid, started_at and
    heartbeat_at (UTC).
    """

    def __init__(self, path: Path, textfile: StateTextfile | None = None) -> None:
        """Nothing is written before ``begin``: until the lock is held, the file is somebody else's.

        Args:
            path: of the file.
            textfile: gets each status too.
        """
        self._path, self._textfile = path, textfile
        self._is_ours = False
        self._mutex = threading.Lock()
        self._values: dict[str, Any] = {
            "state": "running",
            "step": None,
            "error": None,
            "exit_code": None,
            "retryable": None,
            "message": None,
            "remedy": None,
            "restarts": 0,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": _now(),
        }

    @property
    def line(self) -> str:
        """The status as one line of JSON."""
        return json.dumps(self._values, ensure_ascii=False)

    def begin(self) -> None:
        """Start writing the file."""
        self._is_ours = True
        self._update()

    def enter(self, step: Step) -> None:
        """Say which step is being worked on."""
        self._update(step=step)

    def restart(self, error: CollmError) -> None:
        """Say that the step is run again, and why."""
        self._update(restarts=self._values["restarts"] + 1, error=error.name, message=str(error))

    def beat(self) -> None:
        """Say that the run is alive."""
        self._update()

    def end(self, report: ErrorReport | None = None, decision: Mapping[str, Any] | None = None) -> None:
        """Say how the run ended.

        Args:
            report: the error, None when all is done.
            decision: whether the run is to be used, where a rule says so.
        """
        if report is None:
            decided = decision or {"state": "done", "reason": None}
            self._update(state=decided["state"], exit_code=0, retryable=False, error=None, message=decided["reason"])
            return
        state = "interrupted" if report.exit_code in INTERRUPTED_EXIT_CODES else "failed"
        self._update(state=state, **asdict(report), remedy=REMEDIES.get(report.error, UNKNOWN_REMEDY))

    def _update(self, **values: Any) -> None:
        with self._mutex:
            self._values |= {**values, "heartbeat_at": _now()}
            if self._is_ours:
                try:
                    write_json(self._path, self._values)
                    if self._textfile is not None:
                        self._textfile.update(self._values)
                except DiskError as error:  # whoever cannot go on without the disk says so himself
                    logger.warning("%s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
