"""Endpoints of the ranking service for looking around: search of titles, and the comparison of rankings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, StrictInt

from collm_dist.errors import RequestError
from collm_dist.serving.batching import Pass
from collm_dist.serving.http_app import answer_query, describe_errors
from collm_dist.serving.http_schemas import ItemId, RankBody, limit_body
from collm_dist.serving.item_search import ItemSearch
from collm_dist.serving.ranking_comparison import Comparison
from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.service_options import ServiceOptions

MAX_FOUND = 50
MAX_SEARCH = 200


@dataclass(frozen=True)
class ModelComparison:
    """Comparison, and the model of its language model's scores, as in ``/healthz``."""

    comparison: Comparison
    model: str


Compared = ModelComparison | RequestError


class CompareBody(RankBody):
    """User and items to rank. A user, a history or a list of disliked items is required."""

    candidates: list[ItemId] | None = Field(
        None,
        min_length=1,
        description="Ids of items to rank, without repetition; by default the best items by the collaborative model "
        "and the most liked items take turns.",
    )
    top_k: StrictInt | None = Field(
        None, ge=1, description="Return the items that are among this many best of any ranking; by default all."
    )


class NamedItemBody(BaseModel):
    """An item."""

    item_id: str
    title: str


class FoundItemBody(NamedItemBody):
    """An item that was found."""

    likes: int = Field(description="Number of likes in the log.")


class SearchAnswer(BaseModel):
    """Items that match, the best matches first and among equal matches the most liked."""

    items: list[FoundItemBody]
    more: bool = Field(description="Whether more items match.")


class PlaceBody(BaseModel):
    """Place of an item in a ranking of all candidates."""

    score: float = Field(description="Number of likes for popularity, else a logit of a like.")
    rank: int = Field(description="1 is the best.")


class ComparedItemBody(NamedItemBody):
    """An item in all rankings: anchor.score + llm + bias = language_model.score."""

    popularity: PlaceBody = Field(description="By the number of likes in the log.")
    collaborative: PlaceBody | None = Field(description="By the collaborative model; null if the run has none.")
    language_model: PlaceBody = Field(description="By the model of the run, as /rank.")
    anchor: PlaceBody | None = Field(description="By the anchor alone; null if the run has no anchor.")
    llm: float = Field(description="Share of the language model in its score: its own score times the learned gain.")
    bias: float = Field(description="Share that is the same for all items; 0 without an anchor.")


class CompareAnswer(BaseModel):
    """Three rankings of the same candidates."""

    items: list[ComparedItemBody] = Field(description="In the order of the language model.")
    num_candidates: int = Field(description="Number of candidates that were ranked.")
    is_known_user: bool = Field(description="Whether `user` is a user of the log.")
    history: list[NamedItemBody] = Field(description="Liked items that the models read, oldest first.")
    disliked: list[NamedItemBody] = Field(description="Disliked items that the models read, oldest first.")
    warnings: list[str] = Field(
        description="An unknown user, unknown ids in lists of items, and candidates left out because they are not "
        "available."
    )
    model: str = Field(description="Model that scored, as in /healthz.")


def add_search(app: FastAPI, index: Callable[[], ItemSearch]) -> None:
    """Add ``GET /items``.

    Args:
        app: the application.
        index: returns the index of the titles; called for each request.
    """

    # Not async: a search of millions of titles takes tens of milliseconds, and runs in a thread.
    @app.get("/items", response_model=SearchAnswer, responses={422: describe_errors()[422]})
    def find_items(
        search: Annotated[
            str,
            Query(max_length=MAX_SEARCH, description="Words that all occur in the title, or an id; empty: all items."),
        ] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_FOUND, description="Most items to return.")] = 20,
    ) -> Response:
        """Search items by title, without regard to case and accents; without words, list the most liked items."""
        items, more = index().find(search, limit)
        return JSONResponse({"items": [asdict(item) for item in items], "more": more})


def add_comparison(
    app: FastAPI,
    compare: Callable[[RankingQuery], Awaitable[Pass[Compared]]],
    options: ServiceOptions,
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Add ``POST /compare``.

    Args:
        app: the application.
        compare: coroutine that answers a query or raises ``QueueFullError``.
        options: limits and timeouts.
        examples: request bodies for the OpenAPI page.
    """
    body_type = limit_body(options, examples, CompareBody)

    async def compare_items(body: CompareBody) -> Response:
        """Rank the same items by popularity, by the collaborative model and by the language model, with its parts."""
        answer, headers = await answer_query(compare, body, options)
        return JSONResponse({**asdict(answer.comparison), "model": answer.model}, headers=headers)

    compare_items.__annotations__["body"] = Annotated[body_type, Body()]
    app.post("/compare", response_model=CompareAnswer, responses=describe_errors())(compare_items)
