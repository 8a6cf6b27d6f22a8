"""Metrics of the service's passes, which Ray exports for Prometheus."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from collm_dist.llm.packed.kept_contexts import KeptContexts

_REUSED = ("whole", "part", "none")


class PassMetrics:
    """Sizes and durations of the passes of a replica, and what they reused of earlier ones."""

    def __init__(self) -> None:
        """Register the metrics."""
        self._sizes = Histogram("collm_requests_per_pass", "Requests scored together.", [1, 2, 4, 8, 16, 32, 64, 128])
        self._seconds = Histogram("collm_pass_seconds", "Seconds of a pass.", [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30])
        self._contexts = Counter("collm_contexts", "Users' contexts, by how much of each was kept.", ("reused",))
        self._tokens = Counter("collm_context_tokens", "Tokens of contexts, kept or computed.", ("source",))
        self._saved = Counter("collm_saved_milliseconds", "Time that kept tokens would have taken, estimated.")
        self._bytes = Gauge("collm_kept_context_bytes", "Memory of kept contexts.")
        self._hit_rate = Gauge("collm_context_hit_rate", "Share of context tokens that were kept, since the start.")
        self._waiting = Gauge("collm_waiting_requests", "Requests that wait for a pass.")
        self._waiting.set(0)
        self._kept_tokens = self._all_tokens = 0

    def report_pass(self, size: int, took_s: float, num_waiting: int) -> None:
        """Report the number of requests of a pass, its duration in seconds, and the requests that wait after it."""
        self._sizes.observe(size)
        self._seconds.observe(took_s)
        self._waiting.set(num_waiting)

    def report_reuse(self, kept: KeptContexts | None) -> None:
        """Report what has been reused since the last report; None = the service keeps nothing."""
        if kept is None:
            return
        counts = kept.take_counts()
        for reused in _REUSED:
            _add(self._contexts, getattr(counts, reused), {"reused": reused})
        _add(self._tokens, counts.kept_tokens, {"source": "kept"})
        _add(self._tokens, counts.computed_tokens, {"source": "computed"})
        _add(self._saved, 1000 * counts.saved_s, {})
        self._bytes.set(kept.num_bytes)
        self._kept_tokens += counts.kept_tokens
        self._all_tokens += counts.kept_tokens + counts.computed_tokens
        self._hit_rate.set(self._kept_tokens / max(self._all_tokens, 1))


def _add(counter: Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray refuses zero
        counter.inc(value, tags)
