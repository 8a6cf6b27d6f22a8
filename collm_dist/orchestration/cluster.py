"""Connection to a Ray cluster, node checks, and runs of many small tasks."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from collm_dist.config import ClusterConfig
from collm_dist.errors import CollmError, LaunchError
from collm_dist.orchestration.node_facts import check_facts, read_facts
from collm_dist.phases import keep_alive, show_phase
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.stop_signals import build_preempted, preemptible

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Errors of a task that is bound to a lost node.
_NODE_LOST = (TaskUnschedulableError, NodeDiedError, WorkerCrashedError)
# Wait for tasks in flight after one of them has failed.
_GRACE_SECONDS = 5.0
_REFRESH_SECONDS = 1.0


@contextmanager
def connect_ray(cluster: ClusterConfig) -> Iterator[None]:
    """Connect to the configured Ray cluster, or start a local one for the duration of the block.

    Inside a Ray job, use the job's cluster. An existing connection is used and stays open.

    Raises:
        LaunchError: the cluster does not answer, or a local one does not start.
        Preempted: SIGTERM or SIGUSR1 arrived, also inside the block unless it has handlers of its own.
    """
    # Else Ray Train and Ray Tune move their workers to folders of their own, where relative paths lead elsewhere.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cluster.ray_address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {
            "num_cpus": cluster.ray_num_cpus,
            "include_dashboard": False,
            "object_store_memory": int(cluster.object_store_gb * 1e9),
        }
    with preemptible():
        with show_phase("starting Ray" if address is None else f"connecting to Ray at {address}"):
            _start_ray(address, options)
        try:
            with preemptible():  # again, since Ray has set a handler of its own
                yield
        finally:
            ray.shutdown()


def _start_ray(address: str | None, options: Mapping[str, Any]) -> None:
    try:
        # Without "local", Ray would join any cluster on this machine and refuse these options.
        ray.init(address=address or "local", **options)
    except SystemExit as error:  # from Ray's handler of SIGTERM
        raise build_preempted(signal.SIGTERM) from error
    except Exception as error:  # Ray raises plain exceptions if its processes do not start in time
        target = f"Ray at '{address}'" if address else "a local Ray"
        raise LaunchError(
            f"cluster.ray_address: {target} cannot be reached or started: {error}. Start a cluster there (ray start "
            "--head), or unset the address (also RAY_ADDRESS) to use this machine alone; on a busy machine, try again"
        ) from error


def run_here(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function for Ray workers that first changes to this process's working directory, for relative paths.

    A node without this directory calls the function where Ray has started the worker: in a job with a working
    directory, in the node's copy of it.
    """
    folder = Path.cwd()

    @wraps(function)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with suppress(OSError):
            os.chdir(folder)
        return function(*arguments, **options)

    return run


def check_nodes(folder: Path, name: str = "run.dir") -> None:
    """Check that every node of the cluster sees a folder and has the same versions as this node.

    Args:
        folder: existing folder.
        name: setting or option that chose it, for messages.

    Raises:
        LaunchError: a check failed; the message names the node.
    """
    sentinel = folder / ".sentinel"
    with open_atomic(sentinel) as file:
        file.write("collm-dist\n")
    read_remotely, own = ray.remote(num_cpus=0)(read_facts), read_facts(str(sentinel))
    for node in ray.nodes():
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                facts = ray.get(read_remotely.options(scheduling_strategy=strategy).remote(str(sentinel)))
            except _NODE_LOST as error:  # lost since it was listed: other nodes take over its work
                logger.warning("node %s does not answer: %s", node["NodeManagerAddress"], error)
                continue
            check_facts(facts, own, node["NodeManagerAddress"], folder, name)
    sentinel.unlink(missing_ok=True)


@dataclass(frozen=True)
class ByteProgress:
    """Progress in bytes instead of tasks.

    Attributes:
        total: bytes of all tasks.
        count: returns the bytes of a task, given its arguments.
    """

    total: int
    count: Callable[[tuple[Any, ...]], int]


def run_tasks(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    description: str,
    parallelism: int,
    num_gpus: int = 0,
    progress_bar: bool = True,
    progress: ByteProgress | None = None,
    in_order: bool = False,
    memory_remedy: str = "use a machine with more memory",
) -> list[Any]:
    """Run a function over many arguments as Ray tasks and return the results in the order of the arguments.

    Args:
        function: function of the tasks, called in this process's working directory; retried if a worker dies.
        arguments: arguments of each task; object references are resolved. An iterator with ``progress`` is asked for
            the next task when there is room for it.
        description: label of the progress bar.
        parallelism: maximum number of tasks in flight.
        num_gpus: GPUs per task.
        progress_bar: whether to show a progress bar.
        progress: what the bar counts; None = tasks.
        in_order: if several tasks fail, raise the error of the first in the order of the arguments.
        memory_remedy: see ``explain_task_error``.

    Raises:
        CollmError: error of a task.
        LaunchError: workers kept dying, a disk failed, or memory was short.
    """
    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(run_here(function))
    if progress is None:
        arguments = list(arguments)
    results: dict[int, Any] = {}
    waiting, running = enumerate(arguments), dict[Any, tuple[int, int]]()
    with _open_bar(description, arguments, progress, progress_bar) as bar:
        while True:
            while len(running) < parallelism and (task := next(waiting, None)) is not None:
                index, values = task
                running[remote.remote(*values)] = index, 1 if progress is None else progress.count(values)
            if not running:
                return [results[index] for index in range(len(results))]
            while not (done := ray.wait(list(running), num_returns=1, timeout=_REFRESH_SECONDS)[0]):
                keep_alive(bar)
            index, amount = running.pop(done[0])
            try:
                results[index] = ray.get(done[0])
            except ray.exceptions.RayError as error:
                earlier = {ref: other for ref, (other, _) in running.items() if in_order and other < index}
                first = _find_first_error(earlier) or error
                # Short tasks may finish; the others end with this process. Tasks are not cancelled: if a cancellation
                # meets the end of a task, Ray aborts the process without a message (as in ray-project/ray#54798).
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=_GRACE_SECONDS)
                raise explain_task_error(first, description, memory_remedy) from None
            bar.update(amount)


def _open_bar(description: str, arguments: Any, progress: ByteProgress | None, is_shown: bool) -> Any:
    if progress is None:
        return tqdm(total=len(arguments), desc=description, disable=not is_shown, leave=False)
    return tqdm(
        total=progress.total,
        desc=description,
        disable=not is_shown,
        leave=False,
        unit="B",
        unit_scale=True,
        bar_format="{desc} {n_fmt}B of {total_fmt}B |{bar}| {elapsed}<{remaining}",
    )


def _find_first_error(tasks: Mapping[Any, int]) -> Exception | None:
    """Wait for tasks, and return the error of the first that fails in the order of their numbers."""
    for ref in sorted(tasks, key=lambda ref: tasks[ref]):
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            failure: Exception = error
            return failure
    return None


def explain_task_error(error: Exception, description: str, memory_remedy: str) -> Exception:
    """Return the error to raise for a failed task: the task's own error if a user can act on it.

    Args:
        error: from Ray.
        description: name of the work, for messages.
        memory_remedy: imperative; how this work needs less memory.
    """
    cause: object = getattr(error, "cause", None)
    if isinstance(cause, CollmError):
        return cause
    if isinstance(cause, MemoryError):
        return LaunchError(
            f"{description}: a Ray task ran out of memory ({str(cause) or type(cause).__name__}); {memory_remedy}, "
            "and run the same command again to resume"
        )
    is_bug = isinstance(error, ray.exceptions.RayTaskError) and not isinstance(cause, OSError)
    if is_bug:
        return error
    return LaunchError(
        f"{description}: a Ray task failed: {cause or error}. Run the same command again to resume; if "
        f"memory was short, {memory_remedy}"
    )
