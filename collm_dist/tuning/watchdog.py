"""Ends a process that hangs, or whose fellows are gone, with a word on why and its stacks on disk.

A collective does not notice that a process at its other end is dead (NCCL) or stuck (any backend). So two threads look
on while training goes on. One measures how long nothing was completed. The other exchanges heartbeats in a ring, by a
connection of its own: who misses those of its neighbour tells all the others.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from collm_dist.cli import report_error
from collm_dist.distributed import any_rank, get_rank, get_world_size, run_on_rank_0
from collm_dist.errors import WorkerLostError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
BEAT_SECONDS = 5.0
# After it a process counts as lost; long enough for one that swaps or is held by a debugger for a moment.
SILENCE_SECONDS = 30.0
# Between one's own stacks and one's end, in which the others, stuck at the same time, write theirs.
GRACE_SECONDS = 5.0


class Watchdog:
    """Looks on for as long as its block lasts."""

    def __init__(self, folder: Path, timeout_seconds: float, where: Callable[[], str]) -> None:
        """Nothing runs before the block begins.

        Args:
            folder: for ``stacks-rank<k>.txt``.
            timeout_seconds: within which ``beat`` must be called again.
            where: says what is being done, such as the step.
        """
        self._folder, self._timeout, self._where = folder, timeout_seconds, where
        self._done = threading.Event()
        self._lost: int | None = None
        self._store: TCPStore | None = None
        self._threads: list[threading.Thread] = []

    def beat(self) -> None:
        """Say that something was completed."""
        self._beaten = time.monotonic()

    def __enter__(self) -> Watchdog:
        """Start looking on. Collective."""
        self._beaten = self._heard = self._answered = time.monotonic()
        if get_world_size() > 1:
            self._store = _connect()
        self._threads = [threading.Thread(target=self._watch, daemon=True)]
        if self._store is not None:
            self._threads.append(threading.Thread(target=self._exchange, args=(self._store,), daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look on no longer.

        The threads are waited for: one that is inside the store while the interpreter ends aborts the process.
        """
        self._done.set()
        for thread in self._threads:
            thread.join(SILENCE_SECONDS)

    def _watch(self) -> None:
        """End the process once something is wrong; main thread and exchange may both be stuck by then."""
        last = time.monotonic()
        while not self._done.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - last > SILENCE_SECONDS / 4:  # this process itself was stopped: what it missed says nothing
                self._beaten = self._heard = self._answered = now
            last = now
            if now - self._beaten > self._timeout:
                self._end(f"no step and no validation batch was completed for {self._timeout / 60:.4g} minutes")
            elif self._lost is not None:
                self._end(f"process {self._lost} has not been heard of for {SILENCE_SECONDS:.0f} seconds")
            elif self._store is not None and now - self._answered > SILENCE_SECONDS:
                self._end(f"process 0 has not been heard of for {SILENCE_SECONDS:.0f} seconds")

    def _exchange(self, store: TCPStore) -> None:
        """Send heartbeats, listen for those of the next process, and for what others say of theirs."""
        neighbour = (get_rank() + 1) % get_world_size()
        heard = -1
        while not self._done.wait(BEAT_SECONDS):
            try:
                store.add(f"beats-{get_rank()}", 1)
                beats, lost = store.add(f"beats-{neighbour}", 0), store.add("lost", 0)
                now = time.monotonic()
                self._answered = now
                if beats != heard:
                    heard, self._heard = beats, now
                if not lost and now - self._heard > SILENCE_SECONDS:
                    lost = store.add("lost", neighbour + 1)
            except RuntimeError:  # process 0, which keeps the store, is gone
                continue
            if lost:
                self._lost = lost - 1

    def _end(self, what: str) -> None:
        path = self._folder / f"stacks-rank{get_rank()}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        error = WorkerLostError(
            f"process {get_rank()} of {get_world_size()}, {self._where()}: {what}. The stacks of its threads are in "
            f"{path}. Run the same command again to go on from the last checkpoint"
        )
        report_error(error)
        # Unless the main thread comes free by itself; no clean end is possible where it does not.
        if not self._done.wait(GRACE_SECONDS):
            os._exit(error.exit_code)


def _connect() -> TCPStore | None:
    """Return a store that all processes share, kept by the first; None where they cannot reach it. Collective."""
    host, size = os.environ["MASTER_ADDR"], get_world_size()
    limit = timedelta(seconds=SILENCE_SECONDS)
    own = None
    if get_rank() == 0:
        own = TCPStore(host, 0, size, is_master=True, timeout=limit, wait_for_workers=False)
    port: int = run_on_rank_0(lambda: own.port if own is not None else 0)
    try:
        store = own or TCPStore(host, port, size, is_master=False, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        logger.warning("process %d cannot reach port %d of %s (%s): no heartbeats", get_rank(), port, host, error)
        store = None
    return None if any_rank(store is None) else store


# What gloo's plain RuntimeErrors say; NCCL's are DistErrors.
_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "Timed out waiting", "Connection refused")


@contextmanager
def explain_lost_workers(where: Callable[[], str]) -> Iterator[None]:
    """Raise WorkerLostError where a collective fails because another process is gone or does not answer in time.

    Args:
        where: says what is being done.
    """
    before = get_world_size()
    try:
        yield
    except RuntimeError as error:
        size = max(before, get_world_size())  # Ray Train may have closed the group meanwhile
        is_collective = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
        if size == 1 or not is_collective:
            raise
        raise WorkerLostError(
            f"process {get_rank()} of {size}, {where()}: another process is gone or does not answer "
            f"({str(error).splitlines()[0]}). Why, it has said itself, if it could. Run the same command again to go "
            "on from the last checkpoint"
        ) from error
