"""Cases in forked processes: what a parent has imported and loaded costs them nothing, and one that hangs is ended."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 300.0
# Of linux/capability.h and linux/prctl.h: reading and writing whatever a file's mode says; root as any other account.
_MODE_BYPASSES = (1 << 1) | (1 << 2)
_SET_SECUREBITS, _NO_ROOT = 28, 0b11
_CAPABILITY_VERSION = 0x20080522

# Outcome of a case, and its message.
Outcome = tuple[str, str]


def run_forked(
    cases: Sequence[Callable[[], Outcome]], folder: Path, processes: int, deadline: float
) -> Iterator[Outcome]:
    """Run each case in a forked process of its own and yield the outcomes in order; none is begun after the deadline.

    Args:
        cases: each returns its outcome. One that exceeds ``LIMIT_SECONDS`` comes to "hang", one that dies to "crash".
        folder: for the output of the processes.
        processes: at the same time.
        deadline: of ``time.monotonic``.
    """
    running: dict[int, tuple[int, float]] = {}
    ended: dict[int, Outcome] = {}
    begun = yielded = 0
    try:
        while True:
            while begun < len(cases) and len(running) < processes and time.monotonic() < deadline:
                running[_fork(cases[begun], folder / str(begun))] = (begun, time.monotonic())
                begun += 1
            for pid, (number, started) in list(running.items()):
                if (outcome := _reap(pid, folder / str(number), started)) is not None:
                    del running[pid]
                    ended[number] = outcome
            while yielded in ended:
                yield ended.pop(yielded)
                yielded += 1
            if not running and (begun == len(cases) or time.monotonic() >= deadline):
                return
            time.sleep(0.002)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(case: Callable[[], Outcome], folder: Path) -> int:
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    try:
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        outcome: Any = case()
        (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    finally:
        os._exit(0)


def _reap(pid: int, folder: Path, started: float) -> Outcome | None:
    """Return the outcome of a process that has ended or is ended now; None while it runs."""
    outcome: Outcome = ("hang", f"after {LIMIT_SECONDS:g} seconds")
    if os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() < started + LIMIT_SECONDS:
            return None
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    elif (folder / "outcome.json").exists():
        end, message = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        outcome = (end, message)
    else:
        outcome = ("crash", (folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-300:])
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def obey_modes() -> str | None:
    """Give up, for this process and its children, root's right to read files of mode 000; return why that fails."""
    if os.geteuid() != 0:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_SECUREBITS, _NO_ROOT, 0, 0, 0) != 0:
        return f"root cannot give up its right to read any file: {os.strerror(ctypes.get_errno())}"
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of 32 capabilities; then of the next 32
    if libc.capget(header, sets) == 0:
        for place in range(3):
            sets[place] &= ~_MODE_BYPASSES & 0xFFFFFFFF
        if libc.capset(header, sets) == 0:
            return None
    return f"root cannot give up its right to read any file: {os.strerror(ctypes.get_errno())}"
