"""``POST /events``: events that count from the next ranking on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from collm_dist.errors import DiskError, EventStoreError, RequestError
from collm_dist.serving.event_store import Added
from collm_dist.serving.http_app import ERRORS
from collm_dist.serving.http_schemas import ErrorAnswer, EventsAnswer, EventsBody, PartsAnswer
from collm_dist.serving.received_event import Event
from collm_dist.serving.recommender import Recommender
from collm_dist.serving.service_options import ServiceOptions

_NO_STORE = "this service keeps no events; start it with --events DIR"


class EventSink(Protocol):
    """Access to an ``EventStore`` for coroutines."""

    async def add(self, events: Sequence[Event]) -> Added:
        """See ``EventStore.add``."""
        ...

    async def write_parts(self) -> list[str]:
        """Write what is in no part yet, and return the names of the new files; see ``EventStore.write_parts``."""
        ...


def add_event_routes(
    app: FastAPI,
    sink: EventSink | None,
    *,
    get_recommender: Callable[[], Recommender],
    every_event_is_a_like: bool,
    options: ServiceOptions,
    report: Callable[[int, int, int], None] = lambda stored, duplicates, unknown_items: None,
) -> None:
    """Add the paths of events to an application.

    Args:
        app: the application.
        sink: store of the events; None = the paths answer that there is none.
        get_recommender: returns the recommender of the served run.
        every_event_is_a_like: ``dataset.feedback`` is implicit.
        options: the time limit.
        report: called with the numbers of stored events, of duplicates and of unknown items of a request.
    """

    async def receive_events(body: EventsBody) -> Response:
        """Store events. They are on the disk when this answers, and the user's next ranking reads them."""
        recommender = get_recommender()
        events = [
            recommender.spell_ids(
                Event(
                    str(event.event_id),
                    str(event.user),
                    str(event.item),
                    event.time,
                    _read_label(index, event.label, every_event_is_a_like),
                )
            )
            for index, event in enumerate(body.events)
        ]
        added = await _answer_in_time(lambda store: store.add(events))
        items = dict.fromkeys(event.item for event in events)
        unknown = [item for item in items if not recommender.knows_item(item)]
        report(added.stored, added.duplicates, len(unknown))
        return JSONResponse({"stored": added.stored, "duplicates": added.duplicates, "unknown_items": unknown})

    async def write_parts() -> Response:
        """Write the events that are in no Parquet part yet to a new part, for the next run."""
        return JSONResponse({"parts": await _answer_in_time(lambda store: store.write_parts())})

    async def _answer_in_time(work: Callable[[EventSink], Awaitable[Any]]) -> Any:
        if sink is None:
            raise HTTPException(404, _NO_STORE)
        try:
            async with asyncio.timeout(options.request_timeout_s):
                return await work(sink)
        except RequestError as error:
            raise HTTPException(422, str(error)) from None

    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, **about} for status, about in {**ERRORS, 404: {"description": _NO_STORE}}.items()
    }
    app.post("/events", response_model=EventsAnswer, responses=responses)(receive_events)
    app.post("/events/parts", response_model=PartsAnswer, responses=responses)(write_parts)

    @app.exception_handler(DiskError)
    @app.exception_handler(EventStoreError)
    async def answer_unavailable(request: Request, error: EventStoreError | DiskError) -> Response:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})


def _read_label(index: int, label: str | None, every_event_is_a_like: bool) -> int:
    if every_event_is_a_like:
        if label == "dislike":
            raise HTTPException(
                422,
                f"events.{index}.label: 'dislike' cannot be stored, because every event of this run's log is a like; "
                "leave such events out",
            )
        return 1
    if label is None:
        raise HTTPException(422, f"events.{index}.label: is missing; send 'like' or 'dislike'")
    return int(label == "like")
