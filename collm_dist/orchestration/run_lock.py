"""One writer for each run directory: a lock file with host, process and heartbeat."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm_dist.artifacts import write_json
from collm_dist.errors import LaunchError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Hold a run directory for as long as the block lasts.

    A lock whose process is gone (same host) or whose heartbeat has stopped (another host) is taken over with a warning.

    Raises:
        LaunchError: somebody else is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    host = socket.gethostname()
    owner = {"host": host, "pid": os.getpid()}
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _take_over(path, host)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({**owner, "heartbeat": time.time()}, file)
        break
    else:
        raise LaunchError(f"{path}: another process took the lock at the same moment; try again")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            write_json(path, {**owner, "heartbeat": time.time()})

    thread = threading.Thread(target=beat, daemon=True, name="run-lock")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def _take_over(path: Path, host: str) -> None:
    """Remove a stale lock, or say who holds it."""
    try:
        lock: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        age = time.time() - float(lock["heartbeat"])
    except (OSError, ValueError, KeyError, TypeError):
        # Half-written by a process that died in between, or just being written: old ones only.
        lock, age = {}, time.time() - path.stat().st_mtime if path.exists() else 0.0
    alive = age < STALE_SECONDS
    if lock.get("host") == host and "pid" in lock:
        alive = _is_alive(int(lock["pid"]))
    if alive:
        raise LaunchError(
            f"{path.parent} is in use by process {lock.get('pid', '?')} on {lock.get('host', '?')} (heartbeat "
            f"{age:.0f} s ago). Wait for it, stop it, or set run.dir to another directory."
        )
    print(f"WARNING: taking over the stale lock of process {lock.get('pid', '?')} on {lock.get('host', '?')}")
    path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
