"""The ranking service as an ASGI application, independent of the server that runs it.

Every answer is JSON: 2xx, or 4xx with a ``detail`` that says what to change. 503 asks the client to retry; 504 means
that the time limit was exceeded. Requests are not logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.message import Message as Header
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collm_dist.errors import CollmError, QueueFullError, RequestError
from collm_dist.serving.batching import Pass
from collm_dist.serving.http_schemas import (
    ErrorAnswer,
    HealthAnswer,
    RankAnswer,
    RankBody,
    describe_mistakes,
    limit_body,
)
from collm_dist.serving.requests import RankedItem, RankingQuery
from collm_dist.serving.service_options import ServiceOptions

logger = logging.getLogger(__name__)

Ranked = list[RankedItem] | RequestError
_RETRY_AFTER = {"Retry-After": "1"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not JSON."},
    413: {"description": "The body is too large."},
    415: {"description": "The content type is not JSON."},
    422: {"description": "A field is invalid; the message names it, its value and the remedy."},
    503: {"description": "Too many requests are waiting; retry after the seconds in Retry-After."},
    504: {"description": "The request exceeded the service's time limit."},
}


def build_app(
    rank: Callable[[RankingQuery], Awaitable[Pass[Ranked]]],
    health: HealthAnswer,
    options: ServiceOptions,
    examples: Sequence[Mapping[str, Any]],
) -> FastAPI:
    """Build the application.

    Args:
        rank: coroutine that answers a query or raises ``QueueFullError``.
        health: answer of ``/healthz``.
        options: limits and timeouts.
        examples: request bodies for the OpenAPI page.
    """
    app = FastAPI(
        title="collm-dist",
        description="Ranks items for users of a run's log, and for new users by their history.",
        redoc_url=None,
    )
    body_type = limit_body(options, examples)

    async def rank_items(body: RankBody) -> Response:
        """Rank items for a user, best first.

        Headers describe the pass: `Server-Timing` has the waiting time and the duration of the pass in milliseconds,
        `X-Scored-Together` the number of requests in the pass.
        """
        if body.user is None and body.history is None and body.disliked is None:
            raise HTTPException(
                422, "user: give a user or a history; an empty history means that nothing is known about the user"
            )
        async with asyncio.timeout(options.request_timeout_s):
            result = await rank(body.to_query())
        if isinstance(result.answer, RequestError):
            raise HTTPException(422, str(result.answer))
        headers = {
            "Server-Timing": f"queue;dur={1000 * result.waited_s:.1f}, score;dur={1000 * result.took_s:.1f}",
            "X-Scored-Together": str(result.size),
        }
        return JSONResponse({"ranked": [vars(item) for item in result.answer], "model": health.model}, headers=headers)

    # The limits are only known at run time, so the body's type cannot be a static annotation.
    rank_items.__annotations__["body"] = Annotated[body_type, Body()]
    errors = {status: {"model": ErrorAnswer, **about} for status, about in _ERRORS.items()}
    app.post("/rank", response_model=RankAnswer, responses=errors)(rank_items)

    @app.get("/healthz")
    async def read_health() -> HealthAnswer:
        """Report that the service is ready, and its model."""
        return health

    _add_error_handlers(app, options)
    app.add_middleware(_BodyLimit, max_bytes=options.max_body_kib << 10)
    return app


def _add_error_handlers(app: FastAPI, options: ServiceOptions) -> None:
    """Answer every error with JSON that has a ``detail``."""

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
        mistakes = error.errors()
        is_empty = error.body is None
        if not is_empty and not _is_json(request.headers.get("content-type")):
            return _answer(415, "content-type: send the body as application/json")
        return _answer(400 if mistakes[0]["type"] == "json_invalid" else 422, describe_mistakes(mistakes))

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException) -> Response:
        detail = error.detail
        if error.status_code == 404:
            detail = "unknown path; the service has POST /rank, GET /healthz and /docs"
        return _answer(error.status_code, detail, error.headers)

    @app.exception_handler(QueueFullError)
    async def answer_full(request: Request, error: QueueFullError) -> Response:
        return _answer(503, f"{options.max_waiting} requests are waiting; try again in a second", _RETRY_AFTER)

    @app.exception_handler(TimeoutError)
    async def answer_late(request: Request, error: TimeoutError) -> Response:
        return _answer(
            504, f"time limit of {options.request_timeout_s:g} s exceeded; send fewer candidates, or try again later"
        )

    @app.exception_handler(CollmError)
    async def answer_broken(request: Request, error: CollmError) -> Response:
        logger.error("%s: %s", error.name, error)
        return _answer(500, str(error))

    @app.exception_handler(Exception)
    async def answer_bug(request: Request, error: Exception) -> Response:
        return _answer(500, "internal error; see the service's log")


def _is_json(content_type: str | None) -> bool:
    header = Header()
    header["content-type"] = content_type or ""
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _answer(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII, because a client may send lone surrogates, which UTF-8 cannot encode.
    content = json.dumps({"detail": detail})
    return Response(content, status, headers, media_type="application/json")


class _BodyLimit:
    """ASGI middleware that refuses large bodies, before reading them if their length is declared."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        length = int(declared) if declared.isdigit() else 0
        read = 0

        async def receive_some() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if max(read, length) > self._max_bytes:
                limit = self._max_bytes >> 10
                raise HTTPException(
                    413,
                    f"the body exceeds {limit} KiB; send less, or start the service with a larger --max-body-kib",
                )
            return message

        await self._app(scope, receive_some, send)
