"""Lock of a run directory: one writer, named in a lock file that it touches as a heartbeat."""

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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from collm_dist.errors import LaunchError
from collm_dist.runs.atomic_files import explain_disk_errors, write_json
from collm_dist.runs.empty_folders import list_missing, list_names, remove_empty, remove_new_empty

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
# Settings of a run, which its first command writes before its work.
_SETTINGS = "config.yaml"
# Child processes of the holder find its token here and share its lock.
TOKEN_VARIABLE = "COLLM_RUN_LOCK"  # noqa: S105 - no password
BEAT_SECONDS = 10.0
# A first look may hit a failing network disk. So many seconds after it, the second decides whether a lock is lost.
RECHECK_SECONDS = 1.0
# Liveness of a holder on another host shows only in the file's age. Twelve missed beats exceed a file system's delays.
STALE_SECONDS = 120.0


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock.

    Attributes:
        host, pid, started: the process; the start time (seconds since 1970) distinguishes it from a later process with
            the same pid.
        token: unique id of this lock.

    Raises:
        ValueError: a value has the wrong type. Processes are found by token; null would match all without one.
    """

    host: str
    pid: int
    started: float
    token: str

    def __post_init__(self) -> None:
        """Check the values."""
        is_valid = type(self.pid) is int and 0 < self.pid < 1 << 31 and type(self.started) in (int, float)
        if not is_valid or not isinstance(self.host, str) or not (isinstance(self.token, str) and self.token):
            raise ValueError("this is not a process that holds a lock")


@contextmanager
def hold_run_lock(
    run_dir: Path,
    on_beat: Callable[[], None] | None = None,
    beat_seconds: float = BEAT_SECONDS,
    setting: str = "run.dir",
) -> Iterator[bool]:
    """Hold the lock of a run directory for the duration of the block, and leave no new empty folder there.

    Yields whether this process took it. Does nothing in child processes of the holder, or in a launcher's processes
    other than rank 0.

    Args:
        run_dir: created if missing, and removed again if nothing is written to it, or if the block fails when nothing
            but the settings is written.
        on_beat: called with every heartbeat, from another thread.
        beat_seconds: seconds between heartbeats.
        setting: setting or argument that names the folder, for messages.

    Raises:
        LaunchError: a live process holds the lock; the message names host and process.
        ArtifactError: a file is in the place of the folder.
        DiskError: the folder cannot be written.
    """
    path = run_dir / LOCK_NAME
    holder = _read_holder(path)
    is_held = holder is not None and os.environ.get(TOKEN_VARIABLE) == holder.token
    if is_held or os.environ.get("RANK", "0") != "0":
        yield False
        return
    with explain_disk_errors(path):
        missing, old_names = list_missing(run_dir), list_names(run_dir)
    holder = _take(path, setting)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, holder, stop, on_beat, beat_seconds), daemon=True)
    outer_token = os.environ.get(TOKEN_VARIABLE)
    os.environ[TOKEN_VARIABLE] = holder.token
    beats.start()
    worthless = {_SETTINGS}
    try:
        yield True
        worthless = set()
    finally:
        stop.set()
        beats.join()
        if outer_token is None:
            os.environ.pop(TOKEN_VARIABLE, None)
        else:
            os.environ[TOKEN_VARIABLE] = outer_token
        if _read_holder(path) == holder:
            remove_new_empty(run_dir, old_names)
            _release(path, missing, worthless)


def is_locked(run_dir: Path) -> bool:
    """Return whether a live process holds the lock of a run directory; one on another host is alive while it beats."""
    path = run_dir / LOCK_NAME
    if not path.exists():
        return False
    with _guard(path) as guard:
        return _find_live_holder(path, guard) is not None


@contextmanager
def _guard(path: Path) -> Iterator[IO[str]]:
    """Open the file beside a lock that only one process at a time may have open here.

    Raises:
        ArtifactError: it is a link, as it may be in a received run, or a file is in the place of its folder.
        DiskError: writing is not allowed.
    """
    guard_path = path.with_name(f"{path.name}.guard")
    while True:
        with explain_disk_errors(guard_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have removed the folder meanwhile.
        with suppress(FileNotFoundError), explain_disk_errors(guard_path):
            guard = open(guard_path, "a", opener=_open_no_link)  # noqa: SIM115 - closed below
            fcntl.flock(guard, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(guard.fileno()), guard_path.stat()):
                break
            guard.close()
    with guard:
        yield guard


def _release(path: Path, missing: Sequence[Path], worthless: Collection[str]) -> None:
    """Remove a lock, and its folder if that was missing before and has at most worthless files."""
    with _guard(path) as guard:
        path.unlink(missing_ok=True)
        if not missing:
            return
        left = list(path.parent.iterdir())
        if {entry.name for entry in left} <= {Path(guard.name).name, *worthless}:
            for entry in left:
                entry.unlink()
            remove_empty(missing)


def _take(path: Path, setting: str) -> Holder:
    process = psutil.Process()
    new_holder = Holder(socket.gethostname(), process.pid, process.create_time(), uuid.uuid4().hex)
    # Only one of two processes that find a stale lock may take it over.
    with _guard(path) as guard:
        if (holder := _find_live_holder(path, guard)) is not None:
            raise LaunchError(
                f"{setting}: '{path.parent}' is being written by process {holder.pid} on {holder.host}; wait for "
                f"it, stop it, or set {setting} to another directory"
            )
        if (holder := _read_holder(path)) is not None:
            logger.warning(
                "%s: taking over the lock of process %d on %s, which has ended", path.parent, holder.pid, holder.host
            )
            # Its child processes may still run and write.
            end_processes(TOKEN_VARIABLE, holder.token)
        write_json(path, asdict(new_holder))
    return new_holder


def _find_live_holder(path: Path, guard: IO[str]) -> Holder | None:
    """Return the live holder of a lock whose guard is open; the file system's own time tells its age."""
    os.utime(guard.fileno())
    with explain_disk_errors(path):  # a lock that cannot be read may have a holder
        holder = _load_holder(path)
    if holder is not None and _is_alive(holder, os.fstat(guard.fileno()).st_mtime - _find_beat(path)):
        return holder
    return None


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def end_processes(variable: str, value: str) -> None:
    """Kill all other processes on this host whose environment has a variable with this value."""
    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value and process.pid != os.getpid():
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=BEAT_SECONDS)


def _find_beat(path: Path) -> float:
    """Return the time of a lock's last heartbeat; long ago if its holder has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_alive(holder: Holder, age_seconds: float) -> bool:
    if holder.host != socket.gethostname():
        return age_seconds < STALE_SECONDS
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _read_holder(path: Path) -> Holder | None:
    try:
        return _load_holder(path)
    except OSError:
        return None


def _load_holder(path: Path) -> Holder | None:
    """Return the holder that a lock names; None if there is no lock, or no process wrote it.

    Raises:
        OSError: the lock cannot be read.
    """
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None


def _is_lost(path: Path, holder: Holder) -> bool:
    """Return whether a lock is gone or names another holder; not if it cannot be read, since it may be intact."""
    try:
        found = _load_holder(path)
        return found != holder and (found is not None or not path.exists())
    except OSError as error:
        logger.warning("%s cannot be read (%s); the next heartbeat looks again", path, error)
        return False


def _beat(
    path: Path, holder: Holder, stop: threading.Event, on_beat: Callable[[], None] | None, beat_seconds: float
) -> None:
    acts: list[Callable[[], None]] = [lambda: os.utime(path), *([on_beat] if on_beat is not None else [])]
    while not stop.wait(beat_seconds):
        if _is_lost(path, holder):
            if stop.wait(min(beat_seconds, RECHECK_SECONDS)) or not _is_lost(path, holder):
                continue
            logger.error("%s: the lock was removed or taken over by another process; stopping", path.parent)
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell script
                end_processes(TOKEN_VARIABLE, holder.token)
                os._exit(LaunchError.exit_code)
            _thread.interrupt_main()
            return
        for act in acts:
            try:
                act()
            except OSError as error:  # if this thread ended, another host would take over the lock of a living holder
                logger.warning("%s: a heartbeat failed (%s); the next follows in %g s", path, error, beat_seconds)
