"""Working ahead: what comes next is made while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetch(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield what an iterator yields, drawn from it in a thread, up to ``depth`` items ahead.

    What the iterator raises is raised here, in its place. Closing this iterator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        coming = deque(pool.submit(next, source, _END) for _ in range(depth))
        while (item := coming.popleft().result()) is not _END:
            coming.append(pool.submit(next, source, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
