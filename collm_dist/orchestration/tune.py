"""Tuning and evaluation as Ray Train workers that run DeepSpeed on all nodes of a cluster."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import ray

from collm_dist.cli import report_error
from collm_dist.config import Config
from collm_dist.errors import LaunchError, Preempted, WorkerLostError
from collm_dist.orchestration.cluster import check_nodes, run_here
from collm_dist.phases import show_phases
from collm_dist.runs.error_file import ERROR_FILE_VARIABLE, read_error
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.runs.step_processes import explain_end
from collm_dist.runs.stop_signals import build_preempted, handle_stop_signals

_POLL_SECONDS = 0.5
# Files in the folder that driver and workers share during a step.
_STOP, _ERROR = "stop", "error.json"


def run_on_workers(config: Config, run_dir: RunDir, step: Step, force: bool) -> None:
    """Run a step with one Ray Train worker per GPU, or per CPU without GPUs, and print the workers' output.

    SIGTERM, SIGUSR1 and Ctrl-C are forwarded: all workers save a checkpoint after the same step.

    Args:
        config: the experiment; ``cluster.num_processes`` workers, by default one per GPU of the cluster.
        run_dir: run directory on a file system that all nodes share.
        step: stage1, stage2 or eval.
        force: redo the step even if it is done.

    Raises:
        LaunchError: too few devices, or a node has other versions or does not see the run directory.
        StepError: a worker failed and has printed its error.
        WorkerLostError: a worker or its node died.
        Preempted: this process, and so the step, was asked to stop.
        KeyboardInterrupt: the step was interrupted.
    """
    num_workers, use_gpu = count_workers(config.cluster.num_processes, ray.cluster_resources())
    folder = run_dir.path.absolute() / ".workers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    check_nodes(folder)
    settings = {"config": config, "run_dir": str(run_dir.path.absolute()), "step": step, "force": force}
    signals: list[int] = []

    def request_stop(number: int, _: object = None) -> None:
        signals.append(number)
        (folder / _STOP).touch()

    # In a thread, because in the main thread Ray Train would kill the workers on Ctrl-C.
    with concurrent.futures.ThreadPoolExecutor(1) as pool, handle_stop_signals(request_stop), _Output(folder) as output:
        training = pool.submit(
            _fit, settings, folder, num_workers, use_gpu, 60 * config.cluster.collective_timeout_minutes
        )
        while not training.done():
            try:
                concurrent.futures.wait([training], timeout=_POLL_SECONDS)
                output.copy()
            except KeyboardInterrupt:
                request_stop(signal.SIGINT)
        failure = training.exception()
    if failure is None:
        shutil.rmtree(folder)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt
    if failure is not None:
        first = next((line for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
        lost = WorkerLostError(f"{step}: a Ray worker or its node was lost ({first})")
        raise explain_end(read_error(folder / _ERROR), signals) or lost from failure
    if signals:  # after the last step: the caller must stop, even if this step just ended well
        raise build_preempted(signals[0])


def count_workers(requested: int | None, resources: Mapping[str, float]) -> tuple[int, bool]:
    """Return the number of workers of a step, and whether each has a GPU.

    Args:
        requested: configured number; None for one per GPU, or a single worker without GPUs.
        resources: resources of the whole cluster, from Ray.

    Raises:
        LaunchError: the cluster has too few devices.
    """
    kind = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
    available = int(resources.get(kind, 0))
    number = requested or (available if kind == "GPU" else 1)
    if number > available:
        raise LaunchError(f"cluster.num_processes: {number} workers need a {kind} each, the cluster has {available}; "
                          "lower it or add nodes")  # fmt: skip
    return number, kind == "GPU"


def _fit(settings: Mapping[str, Any], folder: Path, num_workers: int, use_gpu: bool, timeout_seconds: float) -> None:
    from ray import train  # late: the import takes seconds
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # Else Ray Train logs what workers print, and the output of a job, which has its workers' logs too, has it twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    TorchTrainer(
        run_here(work),
        train_loop_config={**settings, "folder": str(folder)},
        torch_config=TorchConfig(timeout_s=round(timeout_seconds)),
        scaling_config=train.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, placement_strategy="PACK"),
        run_config=train.RunConfig(
            name=settings["step"],
            storage_path=str(folder / "ray"),
            # The pipeline restarts steps by its own rules, as with a launcher.
            failure_config=train.FailureConfig(max_failures=0),
        ),
    ).fit()


def work(settings: Mapping[str, Any]) -> None:
    """Run one worker of a step. Ray Train has set RANK, WORLD_SIZE etc. and created the process group.

    Args:
        settings: config, run_dir, step, force, and folder, which is shared with the driver.
    """
    from collm_dist.distributed import explain_lost_workers
    from collm_dist.evaluation.report import run_evaluation
    from collm_dist.tuning.run_stage import run_stage

    folder, step = Path(settings["folder"]), settings["step"]
    config, run_dir, force = settings["config"], RunDir(Path(settings["run_dir"])), settings["force"]
    os.environ[ERROR_FILE_VARIABLE] = str(folder / _ERROR)
    # DeepSpeed searches PATH for ninja when it compiles an operator.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    stop = threading.Event()
    # An evaluation writes only its finished report, so it can stop at any moment.
    on_stop = stop.set if step != "eval" else lambda: os._exit(Preempted.exit_code)
    threading.Thread(target=_await_stop, args=(folder / _STOP, on_stop), daemon=True).start()
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            path = folder / f"{name}-{os.environ['RANK']}.log"
            stack.enter_context(redirect(stack.enter_context(path.open("w", encoding="utf-8", buffering=1))))
        show_phases(config.monitoring.progress_bar and os.environ["RANK"] == "0")
        try:
            with explain_lost_workers(lambda: step):
                if step == "eval":
                    run_evaluation(config, run_dir, force)
                else:
                    run_stage(config, run_dir, step, force, stop)
        except Exception as error:
            report_error(error)
            raise


def _await_stop(path: Path, on_stop: Callable[[], None]) -> None:
    while not path.exists():
        threading.Event().wait(_POLL_SECONDS)
    on_stop()


class _Output:
    """Live copy of the workers' output to this process's output."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, TextIO] = {}

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.copy()
        for file in self._files.values():
            file.close()

    def copy(self) -> None:
        """Print new output."""
        for path in sorted(self._folder.glob("std*-*.log")):
            if path not in self._files:
                self._files[path] = path.open(encoding="utf-8", errors="replace", newline="")
            target = sys.stdout if path.name.startswith("stdout") else sys.stderr
            print(self._files[path].read(), end="", file=target, flush=True)
