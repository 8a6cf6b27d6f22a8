"""A real MLflow server on the loopback. Its package cannot be installed beside ours, so uv runs it on its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest

from collm_dist.runs.step_processes import find_free_port

START_SECONDS = 600


@dataclass(frozen=True)
class MlflowServer:
    """Attributes: uri: http://host:port; process: of uv, above those of the server."""

    uri: str
    process: subprocess.Popen

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop all its processes for the block: connections are accepted and get no answer."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)


@contextmanager
def serve_mlflow(folder: Path) -> Iterator[MlflowServer]:
    """Serve an empty store for as long as the block lasts."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if uv is None:
        pytest.skip("needs uv: pip install 'collm-dist[dev]'")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    mlflow = [uv, "tool", "run", "--from", "mlflow>=3,<4", "mlflow"]
    had = subprocess.run([*mlflow, "--version"], cwd=folder, env=environment, capture_output=True, text=True)
    if had.returncode != 0:
        pytest.skip(f"uv cannot install the MLflow server: {had.stderr.strip()[-300:]}")
    port, log = find_free_port(), folder / "server.log"
    command = [*mlflow, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "files")]
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            server = MlflowServer(f"http://127.0.0.1:{port}", process)
            deadline = time.monotonic() + START_SECONDS
            while not _answers(server.uri):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield server
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def _answers(uri: str) -> bool:
    try:
        with urlopen(f"{uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
