"""The service's event store: one Ray actor on the machine with its folder, for the replicas of all machines."""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from collm_dist.errors import CollmError, EventStoreError
from collm_dist.serving.event_store import Added, Changes, EventStore, Ranges
from collm_dist.serving.received_event import Event

logger = logging.getLogger(__name__)

ACTOR_NAME = "collm-dist-events"
_DAY_S = 86_400
_CHECK_S = 60.0
# A model in memory tells the store which events its log holds; after the silence it is taken for dead.
_TELL_S, _SILENCE_S = 15.0, 300.0
# Beyond the time in which Ray restarts a process.
_PATIENCE_S = 60.0


class _EventActor:
    """Owner of the store. Ray starts it again if it dies, and repeats calls, which is safe: events count once."""

    def __init__(self, folder: Path, columns: Mapping[str, Any], part_s: float, part_rows: int, keep_s: float) -> None:
        self._store, self._columns = EventStore(folder), dict(columns)
        self._part_s, self._part_rows, self._keep_s = part_s, part_rows, keep_s
        self._told: dict[str, tuple[Ranges, float]] = {}
        self._waiting = Gauge("collm_events_waiting", "Events that are in no Parquet part yet.")
        self._waiting.set(self._store.count_waiting()[0])
        threading.Thread(target=self._keep_house, daemon=True).start()

    def add(self, events: Sequence[Event]) -> Added:
        return self._store.add(events)

    def read(self, users: Sequence[str], since: int, ranges: Ranges) -> Changes:
        return self._store.read(users, since, ranges)

    def count_items(self, items: Sequence[str], before: int, ranges: Ranges) -> dict[str, tuple[int, int]]:
        return self._store.count_items(items, before, ranges)

    def find_ranges(self, names: Sequence[str]) -> Ranges:
        return self._store.find_ranges(names)

    def tell(self, reader: str, ranges: Ranges) -> None:
        """Note which events a model that is in memory leaves out."""
        self._told[reader] = ranges, time.monotonic()

    def write_parts(self) -> list[str]:
        return [path.name for path in self._store.write_parts(self._columns)]

    def _keep_house(self) -> None:
        """Write parts when they are due, and delete old events that no model reads any more."""
        while True:
            time.sleep(min(_CHECK_S, self._part_s))
            try:
                rows, received = self._store.count_waiting()
                if rows and (rows >= self._part_rows or time.time() - received >= self._part_s):
                    self.write_parts()
                self._waiting.set(self._store.count_waiting()[0])
                self._prune()
            except CollmError as error:  # a full disk: tried again in a minute
                logger.error("%s: %s", error.name, error)
            except Exception:  # this thread must go on
                logger.exception("the store of events is tried again in a minute")

    def _prune(self) -> None:
        # Replicas change over one by one, and may refuse a run after it was loaded.
        silent_since = time.monotonic() - _SILENCE_S
        for reader, (_, at) in list(self._told.items()):
            if at < silent_since:
                del self._told[reader]
        if told := [ranges for ranges, _ in list(self._told.values())]:
            self._store.prune(reduce(_intersect, told), int(time.time() - self._keep_s))


def _intersect(one: Ranges, other: Ranges) -> Ranges:
    """Return the events in both."""
    pairs = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple((first, last) for first, last in pairs if first <= last)


class EventClient:
    """Access of a loaded run to the store, in the form of ``EventSource``; it tells the store as long as it exists."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._name = actor, uuid.uuid4().hex
        self._ranges: Ranges | None = None

    def read(self, users: Iterable[str], since: int = 0, ranges: Ranges = ()) -> Changes:
        """See ``EventStore.read``."""
        found: Changes = _wait(self._actor.read.remote(list(users), since, ranges))
        return found

    def count_items(self, items: Iterable[str], before: int, ranges: Ranges = ()) -> dict[str, tuple[int, int]]:
        """See ``EventStore.count_items``."""
        found: dict[str, tuple[int, int]] = _wait(self._actor.count_items.remote(list(items), before, ranges))
        return found

    def find_ranges(self, names: Iterable[str]) -> Ranges:
        """See ``EventStore.find_ranges``."""
        ranges: Ranges = _wait(self._actor.find_ranges.remote(list(names)))
        _wait(self._actor.tell.remote(self._name, ranges))
        if self._ranges is None:
            threading.Thread(target=_keep_telling, args=(weakref.ref(self),), daemon=True).start()
        self._ranges = ranges
        return ranges

    def tell(self) -> None:
        """Tell the store again which events are left out, without waiting for it."""
        self._actor.tell.remote(self._name, self._ranges or ())


def _keep_telling(reference: weakref.ref[EventClient]) -> None:
    while True:
        time.sleep(_TELL_S)
        client = reference()
        if client is None:
            return
        client.tell()
        del client


class EventWriter:
    """The same for coroutines."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def add(self, events: Sequence[Event]) -> Added:
        """See ``EventStore.add``."""
        try:
            added: Added = await self._actor.add.remote(list(events))
        except RayError as error:
            raise _explain(error) from None
        return added

    async def write_parts(self) -> list[str]:
        """See ``EventStore.write_parts``."""
        try:
            names: list[str] = await self._actor.write_parts.remote()
        except RayError as error:
            raise _explain(error) from None
        return names


def start_event_actor(
    folder: Path, columns: Mapping[str, Any], *, part_minutes: float, part_rows: int, keep_days: float
) -> Any:
    """Start the actor on this machine and return its handle; it ends with this process.

    Args:
        folder: of the store.
        columns: see ``event_parts.describe_columns``.
        part_minutes, part_rows: a part is written when its first event is this old, or when it has this many.
        keep_days: age from which events that all loaded runs have read are deleted.

    Raises:
        CollmError: the store cannot be opened.
    """
    # Its folder need not be on other machines.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 16}
    actor = (
        ray.remote(_EventActor)
        .options(name=ACTOR_NAME, scheduling_strategy=here, **options)
        .remote(folder.absolute(), columns, 60 * part_minutes, part_rows, _DAY_S * keep_days)
    )
    try:
        _wait(actor.find_ranges.remote([]))
    except EventStoreError:
        EventStore(folder).close()  # says what is wrong
        raise
    return actor


def _wait(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=_PATIENCE_S)
    except RayError as error:
        raise _explain(error) from None


def _explain(error: RayError) -> CollmError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, CollmError):
        return cause
    return EventStoreError("the store of events does not answer; try again in a second")
