"""collm-dist: from raw interaction logs to a tuned CoLLM recommender.

collm_dist.load_recommender("runs/mine").rank(history=["B004", "B017"], candidates=["B002", "B090"])
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collm_dist.serving.event_store import EventStore
    from collm_dist.serving.finished_run import load_recommender
    from collm_dist.serving.received_event import Event
    from collm_dist.serving.recommender import Recommender
    from collm_dist.serving.requests import RankedItem, RankingRequest

__all__ = ["Event", "EventStore", "RankedItem", "RankingRequest", "Recommender", "load_recommender"]

# Threads that wait for each other spin. Beside another process the default, 300,000 rounds, makes everything many times
# slower (benchmarks/busy_threads.py); 1,000 rounds cost nothing on a quiet machine. Read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

try:
    __version__ = version("collm-dist")
except PackageNotFoundError:  # a checkout without an installation
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, because torch and transformers take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from collm_dist.serving import event_store, requests

    if name in ("load_recommender", "Recommender"):
        from collm_dist.serving import finished_run

        return getattr(finished_run, name)
    return getattr(event_store if hasattr(event_store, name) else requests, name)
