"""Batching of queries that wait for a busy device."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from collm_dist.errors import EventStoreError, QueueFullError
from collm_dist.serving.batching import Batcher


class Device:
    """Work function that doubles queries, after acquiring a permit for each pass."""

    def __init__(self, *, permits=100):
        self.permits, self.passes = threading.Semaphore(permits), []

    def __call__(self, queries):
        assert self.permits.acquire(timeout=10)
        self.passes.append(list(queries))
        if "wrong" in queries:
            raise ValueError("wrong")
        return [2 * query for query in queries]


def build(device, **options):
    return Batcher(device, **{"max_size": 4, "wait_s": 0, "max_waiting": 100} | options)


async def let_start():
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_a_busy_device_gets_all_that_has_come_meanwhile():
    async def run():
        device, reports = Device(permits=0), []
        batcher = build(device, report=lambda *values: reports.append(values))
        first = asyncio.create_task(batcher.submit(0))
        await let_start()
        others = [asyncio.create_task(batcher.submit(query)) for query in range(1, 7)]
        await let_start()
        device.permits.release(4)
        results = await asyncio.gather(first, *others)
        assert device.passes == [[0], [1, 2, 3, 4], [5, 6]]
        assert [result.answer for result in results] == [0, 2, 4, 6, 8, 10, 12]
        assert [result.size for result in results] == [1, 4, 4, 4, 4, 2, 2]
        assert results[1].waited_s > 0.04
        assert results[0].took_s > 0.04
        assert [(size, num_waiting) for size, _, num_waiting in reports] == [(1, 6), (4, 2), (2, 0)]
        assert (await batcher.submit(8)).answer == 16  # works again after an idle time

    asyncio.run(run())


@pytest.mark.parametrize(("count", "passes"), [(3, [[0, 1, 2]]), (5, [[0, 1, 2, 3], [4]])])
def test_an_idle_device_waits_for_others(count, passes):
    async def run():
        device = Device()
        batcher = build(device, wait_s=0.3)

        async def submit(query):
            await asyncio.sleep(0.001 * query)
            return await batcher.submit(query)

        await asyncio.gather(*(submit(query) for query in range(count)))
        assert device.passes == passes

    asyncio.run(run())


def test_no_more_than_so_many_wait_and_who_gives_up_leaves_room():
    async def run():
        device = Device(permits=0)
        batcher = build(device, max_waiting=2)
        first = asyncio.create_task(batcher.submit(0))
        await let_start()
        waiting = [asyncio.create_task(batcher.submit(query)) for query in (1, 2)]
        await let_start()
        with pytest.raises(QueueFullError):
            await batcher.submit(3)
        waiting[0].cancel()
        first.cancel()  # its pass continues, without a caller
        await let_start()
        last = asyncio.create_task(batcher.submit(4))
        await let_start()
        device.permits.release(2)
        assert [result.answer for result in await asyncio.gather(waiting[1], last)] == [4, 8]
        assert device.passes == [[0], [2, 4]]
        assert waiting[0].cancelled()
        assert first.cancelled()

    asyncio.run(run())


def test_a_query_that_cannot_be_answered_fails_alone():
    async def run():
        device = Device()
        batcher = build(device, wait_s=0.05)
        first, second = await asyncio.gather(*map(batcher.submit, ("a", "wrong")), return_exceptions=True)
        assert (first.answer, str(second)) == ("aa", "wrong")
        assert device.passes == [["a", "wrong"], ["a"], ["wrong"]]
        assert (await batcher.submit("b")).answer == "bb"

    asyncio.run(run())


def test_an_error_that_is_worth_another_try_reaches_all_of_its_pass_at_once():
    def fail(queries):
        passes.append(queries)
        raise EventStoreError("gone")

    async def run():
        batcher = build(fail, wait_s=0.05)
        return await asyncio.gather(*map(batcher.submit, "ab"), return_exceptions=True)

    passes = []
    assert list(map(str, asyncio.run(run()))) == ["gone", "gone"]
    assert passes == [["a", "b"]]


def test_the_wait_for_the_thread_counts_and_who_gives_up_then_is_not_answered():
    async def run():
        device, thread = Device(), ThreadPoolExecutor(1)
        batcher, is_free = build(device, thread=thread), threading.Event()
        thread.submit(is_free.wait, 10)  # another queue's pass
        first, second = (asyncio.create_task(batcher.submit(query)) for query in (1, 2))
        await let_start()
        first.cancel()
        await let_start()
        is_free.set()
        result = await second
        assert (result.answer, result.size, device.passes) == (4, 1, [[2]])
        assert result.waited_s > 0.04 > result.took_s

    asyncio.run(run())


def test_queries_that_cannot_be_compared_leave_the_queue():
    """A comparison of arrays has no truth value, so whoever gives up must be found without one."""

    async def run():
        device = Device(permits=0)
        batcher = build(device, max_size=1)
        tasks = [asyncio.create_task(batcher.submit(np.arange(2))) for _ in range(4)]
        await let_start()
        tasks[2].cancel()
        device.permits.release(4)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [False, False, True, False]
        assert len(device.passes) == 3

    asyncio.run(run())
