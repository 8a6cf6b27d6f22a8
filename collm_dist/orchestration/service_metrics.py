"""Metrics of the ranking service, which Ray exports for Prometheus with the prefix ``ray_``."""

from __future__ import annotations

from datetime import datetime

from ray.serve.metrics import Counter, Gauge

from collm_dist.orchestration.pass_metrics import PassMetrics
from collm_dist.serving.http_schemas import HealthAnswer


class ServiceMetrics(PassMetrics):
    """Metrics of a replica: its passes, its queue, the events that it received, and the run that it serves."""

    def __init__(self) -> None:
        """Register the metrics."""
        super().__init__()
        self._events = {
            "stored": Counter("collm_events_stored", "Events that were stored."),
            "duplicates": Counter("collm_events_duplicates", "Events that had been stored before."),
            "unknown_items": Counter("collm_events_unknown_items", "Items of events that the served run lacks."),
        }
        self._served = Gauge("collm_served_run", "1 for the served run, 0 for earlier ones.", ("run", "model"))
        self._since = Gauge("collm_served_since_seconds", "Time since which the run is served, since 1970.")
        self._refused = Gauge("collm_refused_run", "1 while the run that the link leads to cannot be served.")
        self._changes = Counter("collm_run_changes", "Changes to another run.")
        self._run: dict[str, str] | None = None

    def report_events(self, stored: int, duplicates: int, unknown_items: int) -> None:
        """Count received events."""
        for name, count in (("stored", stored), ("duplicates", duplicates), ("unknown_items", unknown_items)):
            if count:  # Ray's counters refuse 0
                self._events[name].inc(count)

    def report_run(self, health: HealthAnswer) -> None:
        """Show which run is served, and whether another one is refused."""
        run = {"run": health.run, "model": health.model}
        if self._run is not None and self._run != run:
            self._served.set(0, self._run)
            self._changes.inc()
        self._run = run
        self._served.set(1, run)
        if health.since is not None:
            self._since.set(datetime.fromisoformat(health.since).timestamp())
        self._refused.set(int(health.refused is not None))
