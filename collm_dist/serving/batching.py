"""Batching of queries: those that arrive while the device is busy are answered together in its next pass.

``ray.serve.batch`` closes a batch after a few milliseconds, even while the previous pass is running. Steady traffic is
then scored in small batches that queue up. Here a batch closes when the device is free, so batches grow with the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from collm_dist.errors import QueueFullError

Query = TypeVar("Query")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pass(Generic[Answer]):
    """An answer, with the size and timing of the pass that computed it.

    Attributes:
        answer: answer to the query.
        size: number of queries in the pass.
        waited_s: seconds from arrival to the start of the pass.
        took_s: duration of the pass in seconds.
    """

    answer: Answer
    size: int
    waited_s: float
    took_s: float


@dataclass(frozen=True, eq=False)  # two users may ask the same: each waits for its own answer
class _Waiting(Generic[Query, Answer]):
    query: Query
    arrived: float
    future: asyncio.Future[Pass[Answer]]


@dataclass(frozen=True)
class _Failure:
    error: Exception


class Batcher(Generic[Query, Answer]):
    """Queue in front of a function that answers many queries per call. Calls run one at a time, in one thread."""

    def __init__(
        self,
        work: Callable[[list[Query]], list[Answer]],
        *,
        max_size: int,
        wait_s: float,
        max_waiting: int,
        report: Callable[[int, float, int], None] = lambda size, took_s, num_waiting: None,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        """Store the function and the limits.

        Args:
            work: returns the answers to a list of queries, in the same order.
            max_size: most queries per pass.
            wait_s: seconds that the first query at an idle device waits for more.
            max_waiting: most waiting queries, without those of the running pass.
            report: called after each pass with its size, its duration in seconds, and the number of waiting queries.
            thread: executor with one thread, which several queues may share; None = its own thread.
        """
        self._work, self._report = work, report
        self._max_size, self._wait_s, self._max_waiting = max_size, wait_s, max_waiting
        self._waiting: deque[_Waiting[Query, Answer]] = deque()
        self._is_full = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._thread = thread or ThreadPoolExecutor(max_workers=1)

    async def submit(self, query: Query) -> Pass[Answer]:
        """Return the answer to a query. If the caller is cancelled, the query leaves the queue.

        Raises:
            QueueFullError: ``max_waiting`` queries are waiting.
            Exception: an error of ``work`` for this query, or one that is worth trying again (``retryable``).
        """
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError
        waiting = _Waiting(query, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if len(self._waiting) >= self._max_size:
            self._is_full.set()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        try:
            return await waiting.future
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def _run(self) -> None:
        """Run passes until the queue is empty."""
        while self._waiting:
            remaining = self._waiting[0].arrived + self._wait_s - time.perf_counter()
            if remaining > 0 and len(self._waiting) < self._max_size:
                self._is_full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_full.wait(), remaining)
                if not self._waiting:  # all callers were cancelled
                    continue
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_size))]
            await self._answer(batch)
        self._runner = None

    async def _answer(self, batch: list[_Waiting[Query, Answer]]) -> None:
        loop = asyncio.get_running_loop()
        batch, outcomes, started = await loop.run_in_executor(self._thread, self._run_pass, batch)
        took = time.perf_counter() - started
        if batch:
            self._report(len(batch), took, len(self._waiting))
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.future.done():  # cancelled meanwhile
                continue
            if isinstance(outcome, _Failure):
                waiting.future.set_exception(outcome.error)
            else:
                waiting.future.set_result(Pass(outcome, len(batch), started - waiting.arrived, took))

    def _run_pass(
        self, batch: list[_Waiting[Query, Answer]]
    ) -> tuple[list[_Waiting[Query, Answer]], list[Answer | _Failure], float]:
        """Return the queries that still wait, their answers, and the time at which the pass began.

        Another queue may have kept the thread busy, so that callers have given up.
        """
        started = time.perf_counter()
        batch = [waiting for waiting in batch if not waiting.future.done()]
        return batch, self._try([waiting.query for waiting in batch]), started

    def _try(self, queries: list[Query]) -> list[Answer | _Failure]:
        """Answer queries; if that fails, one by one, so that a query that cannot be answered fails alone."""
        if not queries:
            return []
        try:
            return list(self._work(queries))
        except Exception as error:
            if len(queries) == 1 or getattr(error, "retryable", False):
                return [_Failure(error)] * len(queries)
            return [outcome for query in queries for outcome in self._try([query])]
