"""``status.json``: where a pipeline stands, always whole, for whoever watches it from outside."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm_dist.artifacts import write_json
from collm_dist.errors import CollmError

HEARTBEAT_SECONDS = 10.0


class Status:
    """The state of one pipeline run.

    Keys of the file: state (running, done, failed), step, error_class, exit_code, retryable, message, remedy, heartbeat
    (seconds since 1970).
    """

    def __init__(self, path: Path) -> None:
        """Start with an empty state."""
        self._path, self._lock = path, threading.Lock()
        self.values: dict[str, Any] = dict.fromkeys(("step", "error_class", "exit_code", "message", "remedy"))
        self.values |= {"state": "running", "retryable": False}

    def update(self, **values: Any) -> None:
        """Change some keys and write the file."""
        with self._lock:
            self.values |= {**values, "heartbeat": time.time()}
            write_json(self._path, self.values)

    def fail(self, error: CollmError) -> None:
        """Record an error; its first line is the message, the rest is the remedy."""
        message, _, remedy = str(error).partition("\n")
        self.update(
            state="failed",
            error_class=type(error).__name__,
            exit_code=error.exit_code,
            retryable=error.retryable,
            message=message,
            remedy=remedy or None,
        )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Refresh the heartbeat for as long as the block lasts."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                self.update()

        thread = threading.Thread(target=beat, daemon=True, name="status")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def to_line(self) -> str:
        """Return the state as one line of JSON."""
        return json.dumps(self.values, sort_keys=True)
