"""SIGTERM and SIGUSR1: requests to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from collm_dist.errors import Preempted, WorkerLostError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGUSR1 with a function for the duration of the block; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextmanager
def preemptible() -> Iterator[None]:
    """Raise ``Preempted`` from the block when SIGTERM or SIGUSR1 arrives.

    Inside the block the signal raises KeyboardInterrupt: compiled code that waits, as that of ``ray.wait``, passes no
    other exception of a signal handler on, and no ``except Exception`` swallows it. If the signal arrives while a
    ``WorkerLostError`` propagates, that error is raised: launchers stop the other processes of a job when one is lost.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    with handle_stop_signals(stop):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt.__context__, WorkerLostError):
                raise interrupt.__context__ from None
            if received:
                raise build_preempted(received[0]) from None
            raise


def build_preempted(number: int) -> Preempted:
    """Return the error of a command that a signal has stopped."""
    return Preempted(f"stopped by {signal.Signals(number).name}; run the same command again to resume")
