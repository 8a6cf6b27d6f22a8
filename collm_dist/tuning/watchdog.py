"""Watchdog: end a process that hangs or whose peers have died, and write its stack traces.

A collective does not notice that a peer is dead (NCCL) or stuck (any backend). Two threads watch instead: one counts
the seconds without progress and without heartbeats, the other exchanges heartbeats through the process group's store.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from collm_dist.cli import report_error
from collm_dist.distributed import get_rank, get_world_size, wait_for_all
from collm_dist.errors import WorkerLostError

BEAT_SECONDS = 5
SILENCE_SECONDS = 30  # without a heartbeat; shorter pauses happen: swapping, a debugger


class Watchdog:
    """Context in which this process is watched."""

    def __init__(self, folder: Path, timeout_seconds: float, describe_position: Callable[[], str]) -> None:
        """Set where ``stacks-rank<k>.txt`` goes, the longest time between two beats, and how to name the step."""
        self._folder, self._timeout, self._describe_position = folder, timeout_seconds, describe_position
        self._done, self._size = threading.Event(), get_world_size()
        # Seconds are counted, not read from a clock: they stand still while the whole machine is suspended.
        self._seconds, self._beat_at, self._heard_at = 0, 0, [0] * self._size
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._watch, self._exchange)]

    def beat(self) -> None:
        """Note progress."""
        self._beat_at = self._seconds

    def __enter__(self) -> Watchdog:
        """Start watching. Collective."""
        if self._size > 1:
            self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self._store.add(f"heartbeats-{get_rank()}", 1)
            wait_for_all()  # from here on every rank's key exists
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching. A thread inside the store while the interpreter ends would abort the process: join first."""
        self._done.set()
        for thread in self._threads:
            thread.join(SILENCE_SECONDS)

    def _watch(self) -> None:
        while not self._done.wait(1):
            self._seconds += 1
            if self._seconds - self._beat_at > self._timeout:
                self._end(f"no step and no validation batch completed for {self._timeout / 60:.4g} minutes")
            elif self._size > 1 and self._seconds - min(self._heard_at) > SILENCE_SECONDS:
                # Without an answer from the store this process misses its own heartbeats too: rank 0 keeps the store.
                is_deaf = self._heard_at[get_rank()] < self._seconds - 2 * BEAT_SECONDS
                lost = 0 if is_deaf else self._heard_at.index(min(self._heard_at))
                self._end(f"no heartbeat from process {lost} for {SILENCE_SECONDS} seconds")

    def _exchange(self) -> None:
        counts = [b""] * self._size
        with suppress(RuntimeError):  # the process that keeps the store has died
            while self._size > 1 and not self._done.wait(BEAT_SECONDS):
                self._store.add(f"heartbeats-{get_rank()}", 1)
                previous, counts = counts, self._store.multi_get([f"heartbeats-{rank}" for rank in range(self._size)])
                for rank in range(self._size):
                    if counts[rank] != previous[rank]:
                        self._heard_at[rank] = self._seconds

    def _end(self, fault: str) -> None:
        path = self._folder / f"stacks-rank{get_rank()}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        error = WorkerLostError(
            f"process {get_rank()} of {self._size}, {self._describe_position()}: {fault}. The stacks of its "
            f"threads are in {path}. Run the same command again to resume from the last checkpoint"
        )
        report_error(error)
        # Peers that are stuck too write their stacks meanwhile; the main thread may still come free by itself.
        if not self._done.wait(BEAT_SECONDS):
            os._exit(error.exit_code)
