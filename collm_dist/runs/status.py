"""``status.json``: state, step and error of a run, for monitoring."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from collm_dist.errors import CollmError, is_interruption
from collm_dist.monitoring import StateTextfile
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import Step

logger = logging.getLogger(__name__)


class RunStatus:
    """State of one run, written atomically.

    Fields: state (running, done, promoted or rejected, failed, interrupted), step, error (class), exit_code, retryable
    (whether the same command can succeed without a change), message, remedy, restarts (number of restarts of steps;
    while the run is running, error and message are those of the last restart), host, pid, started_at and heartbeat_at
    (UTC).
    """

    def __init__(self, path: Path, textfile: StateTextfile | None = None) -> None:
        """Set up the status without writing: until ``begin``, another process may own the file.

        Args:
            path: path of the file.
            textfile: Prometheus file that is updated as well.
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
        """Record the current step."""
        self._update(step=step)

    def restart(self, error: CollmError) -> None:
        """Record a restart of the step, and its cause."""
        self._update(restarts=self._values["restarts"] + 1, error=error.name, message=str(error))

    def beat(self) -> None:
        """Update the heartbeat."""
        self._update()

    def end(self, error: CollmError | None = None, decision: Mapping[str, Any] | None = None) -> None:
        """Record the end of the run.

        Args:
            error: cause of the failure; None for success.
            decision: promotion decision, if there is a rule.
        """
        if error is None:
            decided = decision or {"state": "done", "reason": None}
            self._update(state=decided["state"], exit_code=0, retryable=False, error=None, message=decided["reason"])
            return
        state = "interrupted" if is_interruption(error) else "failed"
        self._update(state=state, **error.to_dict(), remedy=error.remedy)

    def _update(self, **values: Any) -> None:
        with self._mutex:
            self._values |= {**values, "heartbeat_at": _now()}
            if self._is_ours:
                try:
                    write_json(self._path, self._values)
                    if self._textfile is not None:
                        self._textfile.update(self._values)
                except CollmError as error:  # code that needs the disk raises by itself
                    logger.warning("%s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
