"""The ranking service as an ASGI application, independent of the server that runs it.

Every answer is JSON: 2xx, or 4xx with a ``detail`` that says what to change. 503 asks the client to retry; 504 means
that the time limit was exceeded. Requests are not logged. The ``Gateway`` in front of it limits the body.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message as Header
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from collm_dist.errors import CollmError, QueueFullError, RequestError
from collm_dist.serving.batching import Pass
from collm_dist.serving.docs_page import render_docs_page
from collm_dist.serving.http_errors import RETRY_AFTER, answer_error
from collm_dist.serving.http_schemas import (
    BODIES,
    ErrorAnswer,
    HealthAnswer,
    RankAnswer,
    RankBody,
    describe_mistakes,
    limit_body,
)
from collm_dist.serving.requests import Ranking, RankingQuery
from collm_dist.serving.service_options import ServiceOptions

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ModelAnswer:
    """Answer to a query.

    Attributes:
        ranking: the items.
        model: model that scored them, as in ``/healthz``.
    """

    ranking: Ranking
    model: str


Ranked = ModelAnswer | RequestError
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not JSON."},
    401: {"description": "The service has a token, and the request lacks it."},
    403: {"description": "The service has no token, and the request names another host than this machine."},
    408: {"description": "The body arrived too slowly."},
    413: {"description": "The body is too large."},
    415: {"description": "The content type is not JSON."},
    422: {"description": "A field is invalid; the message names it, its value and the remedy."},
    429: {"description": "Too many requests from this address; retry after the seconds in Retry-After."},
    503: {"description": "Overloaded, or a model is restarting; retry after the seconds in Retry-After."},
    504: {"description": "The request exceeded the service's time limit."},
}


def build_app(
    rank: Callable[[RankingQuery], Awaitable[Pass[Ranked]]],
    read_health: Callable[[], HealthAnswer],
    options: ServiceOptions,
    examples: Sequence[Mapping[str, Any]],
) -> FastAPI:
    """Build the application.

    Args:
        rank: coroutine that answers a query or raises ``QueueFullError``.
        read_health: returns the answer of ``/healthz``.
        options: limits and timeouts.
        examples: request bodies for the OpenAPI page.
    """
    app = FastAPI(
        title="collm-dist",
        description="Ranks items for users of a run's log, and for new users by their history.",
        docs_url=None,  # FastAPI's page loads its scripts from a public server
        redoc_url=None,
    )
    body_type = limit_body(options, examples)

    async def rank_items(body: RankBody) -> Response:
        """Rank items for a user, best first.

        Headers describe the pass: `Server-Timing` has the waiting time and the duration of the pass in milliseconds,
        `X-Scored-Together` the number of requests in the pass.
        """
        answer, headers = await answer_query(rank, body, options)
        content = {"ranked": [vars(item) for item in answer.ranking], "warnings": answer.ranking.warnings}
        return JSONResponse(content | {"model": answer.model}, headers=headers)

    # The limits are only known at run time, so the body's type cannot be a static annotation.
    rank_items.__annotations__["body"] = Annotated[body_type, Body()]
    app.post("/rank", response_model=RankAnswer, responses=describe_errors())(rank_items)

    @app.get("/healthz")
    async def report_health() -> HealthAnswer:
        """Report that the service is ready, and its model."""
        return read_health()

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> Response:
        return HTMLResponse(render_docs_page(app.openapi()))

    _add_error_handlers(app, options)
    return app


async def answer_query(
    answer: Callable[[RankingQuery], Awaitable[Pass[Answer | RequestError]]], body: RankBody, options: ServiceOptions
) -> tuple[Answer, dict[str, str]]:
    """Return the answer to a body, and headers that describe its pass.

    Raises:
        HTTPException: the request is invalid.
        TimeoutError: the time limit is exceeded.
    """
    if body.user is None and body.history is None and body.disliked is None:
        raise HTTPException(
            422, "user: give a user or a history; an empty history means that nothing is known about the user"
        )
    async with asyncio.timeout(options.request_timeout_s):
        result = await answer(body.to_query())
    if isinstance(result.answer, RequestError):
        raise HTTPException(422, str(result.answer))
    headers = {
        "Server-Timing": f"queue;dur={1000 * result.waited_s:.1f}, score;dur={1000 * result.took_s:.1f}",
        "X-Scored-Together": str(result.size),
    }
    return result.answer, headers


def describe_errors() -> dict[int | str, dict[str, Any]]:
    """Return the errors of a request that the model answers, for the OpenAPI document."""
    return {status: {"model": ErrorAnswer, **about} for status, about in ERRORS.items()}


def _add_error_handlers(app: FastAPI, options: ServiceOptions) -> None:
    """Answer every error with JSON that has a ``detail``."""

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
        mistakes = error.errors()
        is_empty = error.body is None
        if not is_empty and not _is_json(request.headers.get("content-type")):
            return answer_error(415, "content-type: send the body as application/json")
        status, body = 400 if mistakes[0]["type"] == "json_invalid" else 422, BODIES.get(request.url.path, RankBody)
        return answer_error(status, describe_mistakes(mistakes, body))

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException) -> Response:
        detail = error.detail
        if error.status_code == 404 and detail == HTTPStatus.NOT_FOUND.phrase:
            detail = (
                "unknown path; the service has POST /rank, /compare, /events and /events/parts, GET /items, /healthz, "
                "/docs and /openapi.json, and a page at /"
            )
        return answer_error(error.status_code, detail, error.headers)

    @app.exception_handler(QueueFullError)
    async def answer_full(request: Request, error: QueueFullError) -> Response:
        return answer_error(503, f"{options.max_waiting} requests are waiting; try again in a second", RETRY_AFTER)

    @app.exception_handler(TimeoutError)
    async def answer_late(request: Request, error: TimeoutError) -> Response:
        return answer_error(
            504, f"time limit of {options.request_timeout_s:g} s exceeded; send fewer candidates, or try again later"
        )

    @app.exception_handler(CollmError)
    async def answer_broken(request: Request, error: CollmError) -> Response:
        logger.error("%s: %s", error.name, error)
        return answer_error(500, str(error))

    @app.exception_handler(Exception)
    async def answer_bug(request: Request, error: Exception) -> Response:
        return answer_error(500, "internal error; see the service's log")


def _is_json(content_type: str | None) -> bool:
    header = Header()
    header["content-type"] = content_type or ""
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
