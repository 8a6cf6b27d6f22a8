"""An event that is not in a run's log yet, and what a log requires of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from collm_dist.data.ingest.file_format import NULLS
from collm_dist.data.ingest.normalize import FIRST_SECOND, LAST_SECOND, find_control_characters, to_ids
from collm_dist.errors import RequestError


@dataclass(frozen=True)
class Event:
    """A user's like or dislike of an item.

    Attributes:
        event_id: the same for every attempt to send this event, different for all other events.
        user, item: raw ids, as a log has them.
        time: seconds since 1970.
        label: 1 = like, 0 = dislike.
    """

    event_id: str
    user: str
    item: str
    time: int
    label: int = 1


def check_events(events: Sequence[Event]) -> None:
    """Refuse events that a log could not hold.

    Raises:
        RequestError: the message names the first such event, the field and the value.
    """
    for name in ("event_id", "user", "item"):
        values = [getattr(event, name) for event in events]
        for index, value in enumerate(values):
            if not isinstance(value, str) or not value or not is_text(value):
                raise RequestError(f"events.{index}.{name}: {value!a} is not an id; ids are strings that are not empty")
        ids = pa.array(values, pa.string())
        broken = find_control_characters(ids).tolist()
        for index, (value, read, is_broken) in enumerate(zip(values, to_ids(ids).to_pylist(), broken, strict=True)):
            if is_broken or value in NULLS:
                raise RequestError(
                    f"events.{index}.{name}: {value!a} is read as a missing value in a log, or has control characters; "
                    "send the id of the log"
                )
            if value != read and name != "event_id":
                raise RequestError(f"events.{index}.{name}: {value!a} would be read as {read!a} in a log; send it so")
    for index, event in enumerate(events):
        if isinstance(event.time, bool) or not isinstance(event.time, int):
            raise RequestError(f"events.{index}.time: {event.time!a} is not an integer; give seconds since 1970")
        if not FIRST_SECOND <= event.time <= LAST_SECOND:
            raise RequestError(
                f"events.{index}.time: {event.time} is outside the years 1 to 9999; give seconds since 1970, not "
                "milliseconds"
            )
        if event.label not in (0, 1):
            raise RequestError(f"events.{index}.label: {event.label!a} is neither 1, a like, nor 0, a dislike")


def is_text(value: str) -> bool:
    """Return whether a string can be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True
