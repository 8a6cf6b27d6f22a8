"""Steps that run as processes of their own: tuning and evaluation, through the deepspeed launcher or plain Python."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from collm_dist.cli import ERROR_FILE_VARIABLE, INTERRUPTED_EXIT_CODE
from collm_dist.errors import CollmError, LaunchError, Preempted, WorkerLostError
from collm_dist.runs.lock import end_processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(find_free_port())]
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


@contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the block in order.

    Raises:
        Preempted: one came.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Preempted(f"stopped by {signal.Signals(number).name}; run the same command again to go on")

    with handle_stop_signals(stop):
        yield


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command to its end; SIGTERM and SIGUSR1 are passed on to the processes that do its work.

    Args:
        command, environment: see ``subprocess.Popen``.

    Raises:
        StepError: it failed; what it said it has printed itself.
        WorkerLostError: it died.
        LaunchError: it ended without a word.
        Preempted: this process was asked to stop, and so was the command.
        KeyboardInterrupt: it was interrupted.
    """
    asked: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        full = {**environment, ERROR_FILE_VARIABLE: str(error_file)}
        with subprocess.Popen(command, env=full) as child:  # noqa: S603 - ours

            def pass_on(number: int, _: FrameType | None) -> None:
                asked.append(number)
                _ask_to_stop(child.pid)

            with handle_stop_signals(pass_on):
                code = _wait(child)
        end_processes(ERROR_FILE_VARIABLE, str(error_file))  # of a launcher that was killed
        if code == 0 and not asked:  # asked in its last moments, it may have ended well all the same
            return
        said = read_error(error_file)
    if signal.SIGINT in asked or code in (INTERRUPTED_EXIT_CODE, -signal.SIGINT):
        raise KeyboardInterrupt
    raise explain_end(said, asked) or _explain_silence(command, code)


def read_error(error_file: Path) -> dict[str, Any] | None:
    """Return what the processes of a step left in ``ERROR_FILE_VARIABLE``'s file, None if nothing."""
    said: dict[str, Any] | None = json.loads(error_file.read_text(encoding="utf-8")) if error_file.exists() else None
    return said


def explain_end(said: dict[str, Any] | None, asked: Sequence[int]) -> CollmError | None:
    """Return the error of a step that failed, None if nothing is known.

    Args:
        said: see ``read_error``.
        asked: signals that asked it to stop.
    """
    if asked and (said is None or said["retryable"]):
        return Preempted(f"stopped by {signal.Signals(asked[0]).name}; run the same command again to go on")
    return None if said is None else StepError(said["error"], said["message"], said["exit_code"], said["retryable"])


def _explain_silence(command: Sequence[str], code: int) -> CollmError:
    """Return the error of a command that failed and said nothing."""
    script = next(Path(part).name for part in command if part.endswith(".py"))
    # A shell adds 128 to a signal's number; Python's exit turns -9 into 247.
    number = next((one for one in (-code, code - 128, 256 - code) if one in set(signal.Signals)), None)
    if number is None:
        return LaunchError(f"{script}: the process ended with exit code {code} without a word")
    hint = "; the machine may be out of memory" if number == signal.SIGKILL else ""
    return WorkerLostError(f"{script}: a process was ended by {signal.Signals(number).name}{hint}")


@contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a function answer SIGTERM and SIGUSR1 for as long as the block lasts."""
    previous = {one: signal.signal(one, handler) for one in STOP_SIGNALS}
    try:
        yield
    finally:
        for one, before in previous.items():
            signal.signal(one, before)


def _ask_to_stop(pid: int) -> None:
    """Send SIGTERM to the processes that do the work: launchers do not pass it on, or kill what takes its time."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for worker in _list_workers(process) or [*process.children(recursive=True), process]:
            worker.terminate()


def _list_workers(process: psutil.Process) -> list[psutil.Process]:
    """Return the first processes at or below one that are no launchers."""
    if not any("deepspeed.launcher" in part for part in process.cmdline()):
        return [process]
    return [worker for child in process.children() for worker in _list_workers(child)]


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a child: a terminal sends its interrupt to the child too, which cleans up and ends."""
    while True:
        with suppress(KeyboardInterrupt):
            return child.wait()


def find_free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
