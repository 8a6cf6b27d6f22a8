"""HTTP schemas: request body, answers, and error messages with a remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, create_model
from pydantic_core import PydanticCustomError

from collm_dist.serving.given_ids import to_whole_number
from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.service_options import ServiceOptions

_MAX_NAMED = 3


def _check_id(value: Any) -> Any:
    number = to_whole_number(value)
    if number is None and not isinstance(value, str):
        raise PydanticCustomError("id", "is not an id; ids are strings or integers")
    return value if number is None else number


ItemId = Annotated[str | int, BeforeValidator(_check_id)]


class RankBody(BaseModel):
    """User and items to rank. A user, a history or a list of disliked items is required."""

    model_config = ConfigDict(extra="forbid")
    example: ClassVar[str] = '{"history": ["B004"], "candidates": ["B001"]}'

    user: ItemId | None = Field(
        None,
        description="Id of a user of the log, whose history comes from the log, or of the run's file of users; any "
        "other id is an unknown user.",
    )
    history: list[ItemId] | None = Field(
        None, description="Ids of liked items, oldest first; by default from the log. Unknown ids are skipped."
    )
    disliked: list[ItemId] | None = Field(
        None, description="Ids of disliked items, oldest first; by default from the log. Unknown ids are skipped."
    )
    history_labels: list[Annotated[StrictInt, Field(ge=0, le=1)]] | None = Field(
        None,
        description="1 = liked, 0 = disliked, for each item of history; replaces disliked. By default all are liked.",
    )
    candidates: list[ItemId] | None = Field(
        None,
        min_length=1,
        description="Ids of items to rank, without repetition; by default the collaborative model retrieves them.",
    )
    allowed: list[ItemId] | None = Field(
        None, description="Ids among which candidates are retrieved; by default all items. Unknown ids are skipped."
    )
    blocked: list[ItemId] | None = Field(
        None, description="Ids that are not retrieved, as well as the user's own. Unknown ids are skipped."
    )
    as_of: StrictInt | None = Field(
        None,
        description="Seconds since 1970; only earlier events of the log count, and only items that are available then "
        "are ranked; by default all events, and the items that are available now.",
    )
    top_k: StrictInt | None = Field(None, ge=1, description="Number of best items to return; by default all.")
    num_retrieved: StrictInt = Field(
        200, ge=1, description="Number of candidates to retrieve among items new to the user, if none are given."
    )

    def to_query(self) -> RankingQuery:
        """Return the query of the Python API."""
        return RankingQuery(**dict(self))


def limit_body(
    options: ServiceOptions, examples: Sequence[Mapping[str, Any]], base: type[RankBody] = RankBody
) -> type[RankBody]:
    """Return a body's type with the service's limits and with examples from its run."""
    fields = base.model_fields
    candidates, num_retrieved = fields["candidates"], fields["num_retrieved"]
    limited: dict[str, Any] = {
        **{
            name: (
                list[ItemId] | None,
                Field(None, max_length=options.max_history, description=fields[name].description),
            )
            for name in ("history", "disliked")
        },
        "candidates": (
            list[ItemId] | None,
            Field(None, min_length=1, max_length=options.max_candidates, description=candidates.description),
        ),
        "num_retrieved": (
            StrictInt,
            Field(
                min(200, options.max_candidates), ge=1, le=options.max_candidates, description=num_retrieved.description
            ),
        ),
    }
    body: type[RankBody] = create_model(base.__name__, __base__=base, __doc__=base.__doc__, **limited)
    body.model_config["json_schema_extra"] = {"examples": [dict(example) for example in examples]}
    return body


class EventBody(BaseModel):
    """A user's like or dislike of an item."""

    model_config = ConfigDict(extra="forbid")

    event_id: ItemId = Field(description="The same for every attempt to send this event, different for all others.")
    user: ItemId = Field(description="Id of the user, of the run's log or new.")
    item: ItemId = Field(description="Id of the item. Items that the run does not know are kept for the next run.")
    time: StrictInt = Field(description="Seconds since 1970.")
    label: Literal["like", "dislike"] | None = Field(
        None, description="Required, unless every event of the run's log is a like (dataset.feedback: implicit)."
    )


class EventsBody(BaseModel):
    """A batch of events: all are stored, or none."""

    example: ClassVar[str] = '{"events": [{"event_id": "1", "user": "u1", "item": "B004", "time": 1767225600}]}'
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [json.loads(example)]})

    events: list[EventBody] = Field(
        min_length=1,
        description="Events in any order, each with event_id, user, item, time (seconds since 1970) and label, like or "
        "dislike; the label may be missing if every event of the run's log is a like.",
    )


class EventsAnswer(BaseModel):
    """Numbers of events; all of them are on the disk."""

    stored: int = Field(description="Number of new events.")
    duplicates: int = Field(description="Number of events that had been received before, or twice in this batch.")
    unknown_items: list[str] = Field(description="Items that this run cannot rank; the next run may know them.")


class PartsAnswer(BaseModel):
    """Parquet parts that were written."""

    parts: list[str] = Field(description="Names of the new files in the folder parquet of --events.")


# Bodies by path, for messages.
BODIES: dict[str, type[RankBody | EventsBody]] = {"/rank": RankBody, "/events": EventsBody}


class RefusedRun(BaseModel):
    """A run that was promoted and could not take over."""

    run: str = Field(description="Name of the run's directory.")
    reason: str
    since: str = Field(description="Time of the refusal, in UTC.")


class RankedItemBody(BaseModel):
    """An item of a ranking."""

    item_id: str
    score: float = Field(description="Logit of a like.")
    rank: int = Field(description="1 is the best.")
    title: str


class RankAnswer(BaseModel):
    """Ranked items, best first."""

    ranked: list[RankedItemBody]
    warnings: list[str] = Field(
        description="An unknown user, unknown ids in lists of items, and candidates left out because they are not "
        "available."
    )
    model: str = Field(description="Model that scored, as in /healthz.")


class HealthAnswer(BaseModel):
    """State and model of the service."""

    ready: bool
    run: str = Field(description="Name of the run's directory.")
    stage: str = Field(description="Stage whose model scores.")
    model: str = Field(description="Prefix of the content hash of the stage.")
    device: str
    users: int = Field(description="Number of users in the run.")
    items: int = Field(description="Number of items in the run.")
    since: str | None = Field(None, description="Time from which this run has served, in UTC.")
    follows: str | None = Field(None, description="Name of the link that the service follows.")
    refused: RefusedRun | None = Field(None, description="Run that the link leads to and that cannot be served.")


class ErrorAnswer(BaseModel):
    """Error and remedy."""

    detail: str


def describe_mistakes(mistakes: Sequence[Mapping[str, Any]], body: type[RankBody | EventsBody] = RankBody) -> str:
    """Return pydantic's errors of a body in a single line, each with field, value and remedy."""
    lines = [_describe_mistake(mistake, body) for mistake in mistakes[:_MAX_NAMED]]
    num_hidden = len(mistakes) - len(lines)
    return "; ".join(lines) + (f"; and {num_hidden} more" if num_hidden else "")


def _describe_mistake(mistake: Mapping[str, Any], body: type[RankBody | EventsBody]) -> str:
    kind, context = mistake["type"], mistake.get("ctx") or {}
    field = ".".join(str(part) for part in mistake["loc"][1:]) or "body"
    value = ascii(mistake.get("input"))
    value = value if len(value) <= 40 else f"{value[:40]}..."
    if kind == "json_invalid":
        return f"body: not JSON at character {field}: {context.get('error')}"
    if field == "body":
        return f"body: not a JSON object; send an object such as {body.example}"
    if kind == "extra_forbidden":
        owner = EventBody if field.startswith("events.") else body
        return f"{field}: unknown field; the fields are {', '.join(owner.model_fields)}"
    if kind == "missing":
        return f"{field}: is missing"
    if kind == "model_attributes_type":
        return f"{field}: {value} is not a JSON object"
    if kind == "too_long":
        flag = "--max-candidates" if field == "candidates" else "--max-history"
        return (
            f"{field}: {context['actual_length']} items exceed the limit of {context['max_length']}; send fewer, or "
            f"start the service with a larger {flag}"
        )
    if kind == "too_short":
        return f"{field}: the list is empty; give at least one item, or omit the field"
    if kind == "list_type":
        return f"{field}: {value} is not a list of {'0 and 1' if field == 'history_labels' else 'ids'}"
    if kind == "int_type":
        return f"{field}: {value} is not an integer"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
        return f"{field}: {value} is out of range; it must be {bound}"
    return f"{field}: {value} {mistake['msg']}"
