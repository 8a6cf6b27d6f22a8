"""Watchdog: end a process that hangs or whose peers have died, and write its stack traces.

A collective does not notice that a peer is dead (NCCL) or stuck (any backend). Two threads watch instead. One measures
the time since training last made progress. The other exchanges heartbeats through the TCP store with which the process
group was set up.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from collm_dist.cli import report_error
from collm_dist.distributed import get_rank, get_world_size, wait_for_all
from collm_dist.errors import WorkerLostError

POLL_SECONDS = 1.0
BEAT_SECONDS = 5.0
# A process without a heartbeat for this long is lost. Shorter pauses happen: swapping, a debugger.
SILENCE_SECONDS = 30.0
# Time between writing the stacks and ending the process, in which peers that are stuck too write theirs.
GRACE_SECONDS = 5.0


class Watchdog:
    """Context in which this process is watched."""

    def __init__(self, folder: Path, timeout_seconds: float, describe_place: Callable[[], str]) -> None:
        """Set the limits.

        Args:
            folder: for ``stacks-rank<k>.txt``.
            timeout_seconds: longest time between two calls of ``beat``.
            describe_place: returns the current activity, such as the step, for the message.
        """
        self._folder, self._timeout, self._describe_place = folder, timeout_seconds, describe_place
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def beat(self) -> None:
        """Note progress."""
        self._progressed = time.monotonic()

    def __enter__(self) -> Watchdog:
        """Start watching. Collective."""
        self._restart_clocks()
        self._threads = [threading.Thread(target=self._watch, daemon=True)]
        if get_world_size() > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            limit = timedelta(seconds=SILENCE_SECONDS)
            store = TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
            store.add(_key(get_rank()), 1)
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

    def _restart_clocks(self) -> None:
        self._progressed = now = time.monotonic()
        self._heard = [now] * get_world_size()

    def _watch(self) -> None:
        """End the process on a fault. The main thread and the exchange of heartbeats may both be stuck by then."""
        woke = time.monotonic()
        while not self._done.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - woke > SILENCE_SECONDS / 4:  # this process was suspended and could not hear its peers
                self._restart_clocks()
            woke = now
            lost = [rank for rank, heard in enumerate(self._heard) if now - heard > SILENCE_SECONDS]
            if now - self._progressed > self._timeout:
                self._end(f"no step and no validation batch completed for {self._timeout / 60:.4g} minutes")
            elif get_world_size() > 1 and lost:
                # Without an answer from the store this process misses its own heartbeats too: rank 0 keeps the store.
                missing = 0 if get_rank() in lost else lost[0]
                self._end(f"no heartbeat from process {missing} for {SILENCE_SECONDS:.0f} seconds")

    def _exchange_heartbeats(self, store: TCPStore) -> None:
        keys = [_key(rank) for rank in range(get_world_size())]
        counts: list[bytes] = [b""] * len(keys)
        while not self._done.wait(BEAT_SECONDS):
            with suppress(RuntimeError):  # the process that keeps the store has died
                store.add(_key(get_rank()), 1)
                previous, counts = counts, store.multi_get(keys)
                for rank, count in enumerate(counts):
                    if count != previous[rank]:
                        self._heard[rank] = time.monotonic()

    def _end(self, fault: str) -> None:
        path = self._folder / f"stacks-rank{get_rank()}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        error = WorkerLostError(
            f"process {get_rank()} of {get_world_size()}, {self._describe_place()}: {fault}. The stacks of its "
            f"threads are in {path}. Run the same command again to resume from the last checkpoint"
        )
        report_error(error)
        # The main thread may still come free by itself; otherwise no clean end is possible.
        if not self._done.wait(GRACE_SECONDS):
            os._exit(error.exit_code)


def _key(rank: int) -> str:
    return f"collm-heartbeats-{rank}"


# Messages of gloo's plain RuntimeErrors; NCCL raises DistError.
_LOST_PEER = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "Connection refused",
)


@contextmanager
def explain_lost_workers(describe_place: Callable[[], str]) -> Iterator[None]:
    """Raise WorkerLostError if a collective fails because a peer has died or does not answer in time.

    Args:
        describe_place: returns the current activity.
    """
    size_before = get_world_size()
    try:
        yield
    except RuntimeError as error:
        size = max(size_before, get_world_size())  # Ray Train may have closed the group meanwhile
        is_collective = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_PEER)
        if size == 1 or not is_collective:
            raise
        raise WorkerLostError(
            f"process {get_rank()} of {size}, {describe_place()}: a peer has died or does not answer "
            f"({str(error).splitlines()[0]}). If the peer could report its error, it is above. Run the same command "
            "again to resume from the last checkpoint"
        ) from error
