"""Progress of a phase that has no bar of its own: what is being done and how far it is, if it takes more than seconds.

Modules announce their phases; whether they are shown is decided once for the process, by its command.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Element = TypeVar("Element")

# A shorter phase shows nothing.
_DELAY_SECONDS = 2.0
# On a terminal, and in a log file, where each refresh adds text.
_REFRESH_SECONDS = {True: 1.0, False: 10.0}
_are_shown = False


def show_phases(shown: bool) -> None:
    """Decide whether this process shows its phases; by default it does not."""
    global _are_shown
    _are_shown = shown


class Phase:
    """Position in a phase."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, amount: int = 1) -> None:
        """Note progress, in the phase's unit."""
        self.done += amount


@contextmanager
def show_phase(text: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """Show a phase on standard error while the block runs, from its third second on.

    Args:
        text: name of the phase, for example ``anchor: features``.
        total: amount of work; None = unknown, then only the time is shown.
        unit: of the amount; ``B`` for bytes.
    """
    phase = Phase()
    if not _are_shown:
        yield phase
        return
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(phase, over, text, total, unit, time.monotonic()), daemon=True)
    thread.start()
    try:
        yield phase
    finally:
        over.set()
        thread.join()


def keep_alive(bar: Any) -> None:
    """Show the time that has passed on a bar whose work has not advanced: each second on a terminal, else seldom."""
    if not bar.disable and time.time() - bar.last_print_t >= _REFRESH_SECONDS[sys.stderr.isatty()]:
        bar.last_print_t = time.time()
        bar.refresh()


def follow(elements: Iterable[Element], text: str, unit: str = "") -> Iterator[Element]:
    """Yield elements of a sequence, or of an iterable of unknown length, and show how far it is; see ``show_phase``."""
    total = len(elements) if isinstance(elements, Sized) else None
    with show_phase(text, total, unit) as phase:
        for element in elements:
            yield element
            phase.advance()


def _follow(phase: Phase, over: threading.Event, text: str, total: int | None, unit: str, started: float) -> None:
    if over.wait(_DELAY_SECONDS):
        return
    bar_format = None if total is not None else "{desc}: {n_fmt}{unit}, {elapsed}" if unit else "{desc}: {elapsed}"
    is_bytes, refresh_seconds = unit == "B", _REFRESH_SECONDS[sys.stderr.isatty()]
    with tqdm(
        total=total, desc=text, unit=unit if is_bytes else f" {unit}", unit_scale=is_bytes, bar_format=bar_format
    ) as bar:
        bar.start_t -= time.monotonic() - started
        while True:
            is_over = over.wait(refresh_seconds)
            bar.update(phase.done - bar.n)
            if is_over:
                return
            bar.refresh()
