"""One writer per run directory: a lock file that says who holds it and is touched as long as the holder lives."""

from __future__ import annotations

import _thread
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from collm_dist.errors import LaunchError
from collm_dist.runs.atomic_files import write_json

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
# Processes that the holder starts find its token here and work under its lock.
TOKEN_VARIABLE = "COLLM_RUN_LOCK"  # noqa: S105 - no password
BEAT_SECONDS = 10.0
# On another host only the file's age tells. Twelve missed beats are no hiccup of a file system.
STALE_SECONDS = 120.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid, started: the process; its start time (seconds since 1970) tells it from a later one of that number.
        token: of this very lock.
    """

    host: str
    pid: int
    started: float
    token: str


@contextmanager
def hold_run_lock(
    run_dir: Path, on_beat: Callable[[], None] | None = None, beat_seconds: float = BEAT_SECONDS
) -> Iterator[None]:
    """Hold a run directory for as long as the block lasts.

    Does nothing in processes that the holder has started, and in all of a launcher's processes but the first.

    Args:
        run_dir: made if needed.
        on_beat: called with every heartbeat, from another thread.
        beat_seconds: between heartbeats.

    Raises:
        LaunchError: somebody alive holds it; the message names host and process.
    """
    path = run_dir / LOCK_NAME
    holder = _read_holder(path)
    is_held = holder is not None and os.environ.get(TOKEN_VARIABLE) == holder.token
    if is_held or os.environ.get("RANK", "0") != "0":
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = _take(path)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, holder, stop, on_beat, beat_seconds), daemon=True)
    outer_token = os.environ.get(TOKEN_VARIABLE)
    os.environ[TOKEN_VARIABLE] = holder.token
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        if outer_token is None:
            os.environ.pop(TOKEN_VARIABLE, None)
        else:
            os.environ[TOKEN_VARIABLE] = outer_token
        if _read_holder(path) == holder:
            path.unlink(missing_ok=True)


def _take(path: Path) -> Holder:
    process = psutil.Process()
    new_holder = Holder(socket.gethostname(), process.pid, process.create_time(), uuid.uuid4().hex)
    # Two who find a stale lock at once must not both take it over.
    with path.with_name(f"{path.name}.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        os.utime(guard.fileno())
        holder = _read_holder(path)
        if holder is not None:
            if _is_alive(holder, os.fstat(guard.fileno()).st_mtime - path.stat().st_mtime):
                raise LaunchError(
                    f"run.dir: '{path.parent}' is being written by process {holder.pid} on {holder.host}; wait for it, "
                    "stop it, or set run.dir to another directory"
                )
            logger.warning(
                "%s: taking over the lock of process %d on %s, which is gone", path.parent, holder.pid, holder.host
            )
            # What it had started may live on, and write.
            end_processes(TOKEN_VARIABLE, holder.token)
        write_json(path, asdict(new_holder))
    return new_holder


def end_processes(variable: str, value: str) -> None:
    """Kill all processes of this user on this host that were started with a variable of that value."""
    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value and process.pid != os.getpid():
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=BEAT_SECONDS)


def _is_alive(holder: Holder, age_seconds: float) -> bool:
    if holder.host != socket.gethostname():
        return age_seconds < STALE_SECONDS
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _beat(
    path: Path, holder: Holder, stop: threading.Event, on_beat: Callable[[], None] | None, beat_seconds: float
) -> None:
    while not stop.wait(beat_seconds):
        if _read_holder(path) != holder:
            logger.error("%s: the lock was taken over by another process; stopping", path.parent)
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell script
                end_processes(TOKEN_VARIABLE, holder.token)
                os._exit(LaunchError.exit_code)
            _thread.interrupt_main()
            return
        os.utime(path)
        if on_beat is not None:
            on_beat()
