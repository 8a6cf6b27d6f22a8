"""Steps that run as processes of their own: tuning and evaluation, through the deepspeed launcher or plain Python."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from collm_dist.cli import ERROR_FILE_VARIABLE, INTERRUPTED_EXIT_CODE
from collm_dist.errors import CollmError, LaunchError


class StepError(CollmError):
    """A step that ran as a process of its own has failed; it carries what the process said."""

    def __init__(self, name: str, message: str, exit_code: int, retryable: bool) -> None:
        super().__init__(message)
        self._name, self.exit_code, self.retryable = name, exit_code, retryable

    @property
    def name(self) -> str:
        """Class of the error inside the process."""
        return self._name


def build_command(script: Path, arguments: Sequence[str], num_processes: int | None, num_gpus: int) -> list[str]:
    """Return the command line that starts a script.

    Without a GPU a single process needs no launcher. With GPUs, the launcher takes those that CUDA_VISIBLE_DEVICES
    allows; a number of processes would make it ignore that (see ``build_environment``).

    Args:
        script: Python file that calls ``run_command``.
        arguments: of the script.
        num_processes: as configured, None for one per GPU.
        num_gpus: on this machine, as far as they are visible.
    """
    if num_gpus == 0 and num_processes in (None, 1):
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_find_free_port())]
    if num_processes is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        launcher += ["--num_gpus", str(num_processes)]
    return [*launcher, str(script), *arguments]


def build_environment(num_processes: int | None, num_gpus: int) -> dict[str, str]:
    """Return what the processes see: devices, and threads that do not outnumber the cores."""
    environment = dict(os.environ)
    # DeepSpeed looks for ninja there where an operator has to be compiled.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if num_gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (num_processes or 1))))
    elif num_processes is not None and "CUDA_VISIBLE_DEVICES" in environment:
        visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:num_processes])
    return environment


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command to its end; SIGTERM is passed on to it.

    Raises:
        StepError: it failed; what it said it has printed itself.
        LaunchError: it died.
        KeyboardInterrupt: it was interrupted.
    """
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        full = {**environment, ERROR_FILE_VARIABLE: str(error_file)}
        with subprocess.Popen(command, env=full) as child:  # noqa: S603 - our own scripts
            previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            try:
                code = _wait(child)
            finally:
                signal.signal(signal.SIGTERM, previous)
        if code == 0:
            return
        said = json.loads(error_file.read_text(encoding="utf-8")) if error_file.exists() else None
    if code in (INTERRUPTED_EXIT_CODE, -signal.SIGINT):
        raise KeyboardInterrupt
    if said is not None:
        raise StepError(said["error"], said["message"], said["exit_code"], said["retryable"])
    cause = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = "; the machine may be out of memory" if code in (-signal.SIGKILL, 128 + signal.SIGKILL) else ""
    script = next(Path(part).name for part in command if part.endswith(".py"))
    raise LaunchError(f"{script}: the process {cause} without a word{hint}")


def _wait(child: subprocess.Popen[bytes]) -> int:
    """A terminal sends its interrupt to the child too, which ends when it has put things in order."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
