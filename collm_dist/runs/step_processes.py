"""Processes of a tuning or evaluation step: their command line, environment, signals and end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from collm_dist.errors import CollmError, Interrupted, LaunchError, StepError, WorkerLostError
from collm_dist.runs.error_file import ERROR_FILE_VARIABLE, read_error
from collm_dist.runs.lock import end_processes
from collm_dist.runs.stop_signals import build_preempted, handle_stop_signals


def build_command(script: Path, arguments: Sequence[str], num_processes: int | None, num_gpus: int) -> list[str]:
    """Return the command line that starts a script.

    A single process without a GPU needs no launcher. With GPUs, the launcher takes those in CUDA_VISIBLE_DEVICES; given
    a number of processes, it would ignore that variable (see ``build_environment``).

    Args:
        script: Python file that calls ``run_command``.
        arguments: of the script.
        num_processes: as configured; None for one per GPU.
        num_gpus: visible GPUs of this machine.
    """
    if num_gpus == 0 and num_processes in (None, 1):
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(find_free_port())]
    if num_processes is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        launcher += ["--num_gpus", str(num_processes)]
    return [*launcher, str(script), *arguments]


def build_environment(num_processes: int | None, num_gpus: int) -> dict[str, str]:
    """Return the environment of the processes: visible devices, and no more threads than cores."""
    environment = dict(os.environ)
    # DeepSpeed searches PATH for ninja when it compiles an operator.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if num_gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (num_processes or 1))))
    elif num_processes is not None and "CUDA_VISIBLE_DEVICES" in environment:
        visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:num_processes])
    return environment


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command to its end and forward SIGTERM and SIGUSR1 to its worker processes.

    Args:
        command, environment: see ``subprocess.Popen``.

    Raises:
        StepError: the command failed and has printed its error.
        WorkerLostError: a process was killed.
        LaunchError: the command failed without an error message.
        Preempted: this process, and so the command, was asked to stop.
        KeyboardInterrupt: the command was interrupted.
    """
    signals: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        full_environment = {**environment, ERROR_FILE_VARIABLE: str(error_file)}
        with subprocess.Popen(command, env=full_environment) as child:  # noqa: S603 - built by build_command

            def forward(number: int, _: FrameType | None) -> None:
                signals.append(number)
                terminate_workers(child.pid)

            with handle_stop_signals(forward):
                code = _wait(child)
        end_processes(ERROR_FILE_VARIABLE, str(error_file))  # survivors of a killed launcher
        # After a signal the caller must stop, even if the step just ended well.
        if code == 0 and not signals:
            return
        error = read_error(error_file)
    if code in (Interrupted.exit_code, -signal.SIGINT):
        raise KeyboardInterrupt
    raise explain_end(error, signals) or _explain_silence(command, code)


def explain_end(error: CollmError | None, signals: Sequence[int]) -> CollmError | None:
    """Return the error to raise for a failed step; None if its cause is unknown.

    Args:
        error: from the error file of its processes.
        signals: that asked the step to stop.
    """
    if signals and (error is None or error.retryable):
        return build_preempted(signals[0])
    return None if error is None else StepError(error)


def _explain_silence(command: Sequence[str], code: int) -> CollmError:
    """Return the error of a command that failed without an error message."""
    script = next(Path(part).name for part in command if part.endswith(".py"))
    # A shell adds 128 to a signal's number; sys.exit turns -9 into 247.
    number = next((number for number in (-code, code - 128, 256 - code) if number in set(signal.Signals)), None)
    if number is None:
        return LaunchError(f"{script}: the process ended with exit code {code} and no error message")
    hint = "; the machine may be out of memory" if number == signal.SIGKILL else ""
    return WorkerLostError(f"{script}: a process was killed by {signal.Signals(number).name}{hint}")


def terminate_workers(pid: int) -> None:
    """Send SIGTERM to the worker processes: launchers do not forward it, or kill workers that need time to stop."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for worker in _list_workers(process) or [*process.children(recursive=True), process]:
            worker.terminate()


def _list_workers(process: psutil.Process) -> list[psutil.Process]:
    """Return the first processes, at or below one, that are not launchers."""
    if not any("deepspeed.launcher" in part for part in process.cmdline()):
        return [process]
    return [worker for child in process.children() for worker in _list_workers(child)]


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for a child. A terminal sends Ctrl-C to the child too, which then ends by itself."""
    while True:
        with suppress(KeyboardInterrupt):
            return child.wait()


def find_free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
