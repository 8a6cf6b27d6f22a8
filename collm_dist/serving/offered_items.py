"""Items that may be offered at a request's time, and the warning about candidates that may not."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.ingest.normalize import FIRST_SECOND, LAST_SECOND, format_time
from collm_dist.data.shards.availability import Availability
from collm_dist.serving.unknown_ids import show_ids


class OfferedItems:
    """Items of a run by the time of a request: its ``as_of``, else now.

    Attributes:
        has_windows: whether the run knows times of availability; otherwise all items are offered.
    """

    def __init__(self, availability: Availability | None, now: int | None = None) -> None:
        """Store the windows.

        Args:
            availability: windows of the run's items; None = there are none.
            now: seconds since 1970 that stand for now; None = the clock at each request.
        """
        self.has_windows, self._availability, self._now = availability is not None, availability, now

    def find(self, as_of: int | None) -> NDArray[np.bool_] | None:
        """Return the (I,) mask of the items that may be offered, None for all of them."""
        return None if self._availability is None else self._availability.find_available(self._find_time(as_of))

    def warn(self, left_out: Sequence[str], count: int, as_of: int | None) -> list[str]:
        """Return a sentence about the candidates of a request that are left out, if there are any.

        Args:
            left_out: their raw ids.
            count: number of the request's candidates.
            as_of: time of the request.
        """
        if not left_out:
            return []
        moment = format_time(self._find_time(as_of))
        return [
            f"candidates: {len(left_out)} of {count} items are not available at {moment} (UTC) and are left out "
            f"({show_ids(left_out)})"
        ]

    def _find_time(self, as_of: int | None) -> int:
        now = self._now if as_of is None else int(as_of)
        return min(max(int(time.time()) if now is None else now, FIRST_SECOND), LAST_SECOND)
