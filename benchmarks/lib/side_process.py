"""A side of a comparison in a process of its own: it answers every line that it is sent with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lib.machine import ROOT


def build_environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process that imports from this repository, with further variables."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **settings}


class SideProcess:
    """A started side.

    Attributes:
        ready: its first answer.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start the process and wait until it is ready.

        Raises:
            SystemExit: the process has ended; the message holds the end of its standard error.
        """
        self._name = " ".join(command[:6])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            bufsize=1,
        )
        while not (line := self._read_line()).startswith("{"):
            pass  # libraries print while they are imported
        self.ready: Any = json.loads(line)

    def ask(self, request: str) -> Any:
        """Send a line and return the answer.

        Raises:
            SystemExit: the process has ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        return json.loads(self._read_line())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            sys.exit(f"{self._name} has ended:\n{self._errors.read()[-3000:]}")
        return line
