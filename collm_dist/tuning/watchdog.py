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
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from collm_dist.cli import report_error
from collm_dist.distributed import get_rank, get_world_size, wait_for_all
from collm_dist.errors import WorkerLostError

BEAT_SECONDS = 5.0
# A process without a heartbeat for this long is lost. Shorter pauses happen: swapping, a debugger.
SILENCE_SECONDS = 30
# Time between writing the stacks and ending the process, in which peers that are stuck too write theirs.
GRACE_SECONDS = 5.0


class Watchdog:
    """Context in which this process is watched."""

    def __init__(self, folder: Path, timeout_seconds: float, describe_position: Callable[[], str]) -> None:
        """Set the limits.

        Args:
            folder: for ``stacks-rank<k>.txt``.
            timeout_seconds: longest time between two calls of ``beat``.
            describe_position: returns the current activity, such as the step, for the message.
        """
        self._folder, self._timeout, self._describe_position = folder, timeout_seconds, describe_position
        self._done = threading.Event()

    def beat(self) -> None:
        """Note progress."""
        self._idle_seconds = 0

    def __enter__(self) -> Watchdog:
        """Start watching. Collective."""
        self.beat()
        self._silent_seconds = [0] * get_world_size()
        self._threads = [threading.Thread(target=self._watch, daemon=True)]
        if get_world_size() > 1:
            limit = timedelta(seconds=SILENCE_SECONDS)
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(*address, is_master=False, timeout=limit, wait_for_workers=False)
            store.add(f"collm-heartbeats-{get_rank()}", 1)
            wait_for_all()  # from here on every rank's key exists
            self._threads.append(threading.Thread(target=self._exchange_heartbeats, args=(store,), daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching. A thread inside the store while the interpreter ends would abort the process: join first."""
        self._done.set()
        for thread in self._threads:
            thread.join(SILENCE_SECONDS)

    def _watch(self) -> None:
        """End the process on a fault. The main thread and the exchange of heartbeats may both be stuck by then.

        Seconds are counted, not read from a clock: they stand still while the whole machine is suspended.
        """
        while not self._done.wait(1.0):
            self._idle_seconds += 1
            for rank in range(get_world_size()):
                self._silent_seconds[rank] += 1
            lost = [rank for rank, seconds in enumerate(self._silent_seconds) if seconds > SILENCE_SECONDS]
            if self._idle_seconds > self._timeout:
                self._end(f"no step and no validation batch completed for {self._timeout / 60:.4g} minutes")
            elif get_world_size() > 1 and lost:
                # Without an answer from the store this process misses its own heartbeats too: rank 0 keeps the store.
                missing = 0 if get_rank() in lost else lost[0]
                self._end(f"no heartbeat from process {missing} for {SILENCE_SECONDS} seconds")

    def _exchange_heartbeats(self, store: TCPStore) -> None:
        keys = [f"collm-heartbeats-{rank}" for rank in range(get_world_size())]
        counts: list[bytes] = [b""] * len(keys)
        while not self._done.wait(BEAT_SECONDS):
            with suppress(RuntimeError):  # the process that keeps the store has died
                store.add(keys[get_rank()], 1)
                previous, counts = counts, store.multi_get(keys)
                for rank, count in enumerate(counts):
                    if count != previous[rank]:
                        self._silent_seconds[rank] = 0

    def _end(self, fault: str) -> None:
        path = self._folder / f"stacks-rank{get_rank()}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        error = WorkerLostError(
            f"process {get_rank()} of {get_world_size()}, {self._describe_position()}: {fault}. The stacks of its "
            f"threads are in {path}. Run the same command again to resume from the last checkpoint"
        )
        report_error(error)
        # The main thread may still come free by itself; otherwise no clean end is possible.
        if not self._done.wait(GRACE_SECONDS):
            os._exit(error.exit_code)
