"""What goes over HTTP: the body of a request, the answer, and errors in words that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, create_model
from pydantic_core import PydanticCustomError

from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.service_options import ServiceOptions

_MAX_NAMED = 3


def _check_id(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("id", "is no id; ids are texts or whole numbers")
    return value


ItemId = Annotated[str | int, BeforeValidator(_check_id)]


class RankBody(BaseModel):
    """Whom to rank for, and what. A user or a history must be named."""

    model_config = ConfigDict(extra="forbid")

    user: ItemId | None = Field(
        None,
        description="Id of a user of the log, who gets the history of the log; one that it does not hold is unknown.",
    )
    history: list[ItemId] | None = Field(
        None, description="Ids of liked items, oldest first; by default those of the log. Unknown ones are passed over."
    )
    candidates: list[ItemId] | None = Field(
        None,
        min_length=1,
        description="Ids of items to rank, each once; by default the collaborative model finds them.",
    )
    as_of: StrictInt | None = Field(
        None, description="Seconds since 1970: only what the log has before counts; by default all of it."
    )
    top_k: StrictInt | None = Field(None, ge=1, description="How many of the best to return; by default all.")
    num_retrieved: StrictInt = Field(
        200, ge=1, description="How many candidates to find, among what is new to the user, where none are given."
    )

    def to_query(self) -> RankingQuery:
        """Return the same for the Python API."""
        return RankingQuery(**dict(self))


def limit_body(options: ServiceOptions, examples: Sequence[Mapping[str, Any]]) -> type[RankBody]:
    """Return the body's type with a service's limits and with examples from its own run."""
    fields = RankBody.model_fields
    history, candidates, num_retrieved = fields["history"], fields["candidates"], fields["num_retrieved"]
    limited: dict[str, Any] = {
        "history": (
            list[ItemId] | None,
            Field(None, max_length=options.max_history, description=history.description),
        ),
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
    body: type[RankBody] = create_model("RankBody", __base__=RankBody, __doc__=RankBody.__doc__, **limited)
    body.model_config["json_schema_extra"] = {"examples": [dict(example) for example in examples]}
    return body


class RankedItemBody(BaseModel):
    """An item in its place."""

    item_id: str
    score: float = Field(description="Logit of a like.")
    rank: int = Field(description="1 for the best.")
    title: str


class RankAnswer(BaseModel):
    """The items, the best first."""

    ranked: list[RankedItemBody]
    model: str = Field(description="Which model has scored, as in /healthz.")


class HealthAnswer(BaseModel):
    """What the service ranks with."""

    ready: bool
    run: str = Field(description="Name of the run's directory.")
    stage: str = Field(description="Stage of the run whose model scores.")
    model: str = Field(description="Start of the content hash of what that stage has made.")
    device: str
    users: int = Field(description="Known to the run.")
    items: int = Field(description="Known to the run.")


class ErrorAnswer(BaseModel):
    """What is wrong, and what to do."""

    detail: str


def describe_mistakes(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """Return what pydantic finds wrong with a body as one line, each field with its value and a remedy."""
    lines = [_describe_mistake(mistake) for mistake in mistakes[:_MAX_NAMED]]
    num_hidden = len(mistakes) - len(lines)
    return "; ".join(lines) + (f"; and {num_hidden} more" if num_hidden else "")


def _describe_mistake(mistake: Mapping[str, Any]) -> str:
    kind, context = mistake["type"], mistake.get("ctx") or {}
    field = ".".join(str(part) for part in mistake["loc"][1:]) or "body"
    value = ascii(mistake.get("input"))
    value = value if len(value) <= 40 else f"{value[:40]}..."
    if kind == "json_invalid":
        return f"body: no JSON at character {field}: {context.get('error')}"
    if field == "body":
        return 'body: it is no JSON object; send one such as {"history": ["B004"], "candidates": ["B001"]}'
    if kind == "extra_forbidden":
        return f"{field}: there is no such field; there are {', '.join(RankBody.model_fields)}"
    if kind == "too_long":
        flag = "--max-history" if field == "history" else "--max-candidates"
        return (
            f"{field}: {context['actual_length']} items are more than the {context['max_length']} that this service "
            f"takes; send fewer, or start it with a larger {flag}"
        )
    if kind == "too_short":
        return f"{field}: the list is empty; name at least one item, or leave the field out"
    if kind == "list_type":
        return f"{field}: {value} is no list of ids"
    if kind == "int_type":
        return f"{field}: {value} is no whole number"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
        return f"{field}: {value} is out of range; it must be {bound}"
    return f"{field}: {value} {mistake['msg']}"
