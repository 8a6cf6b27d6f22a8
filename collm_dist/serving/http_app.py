"""The ranking service as an ASGI application, whatever server it runs on.

Whatever a client sends is answered with JSON: 2xx, or 4xx with a ``detail`` that says what to change. 503 asks to try
again, 504 has given up. Nothing of a request is logged.
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
    400: {"description": "The body is no JSON."},
    413: {"description": "The body is too large."},
    415: {"description": "The content type is not JSON."},
    422: {"description": "A field is wrong; the message names it, its value and what to do."},
    503: {"description": "Too many requests wait; try again after the seconds in Retry-After."},
    504: {"description": "The request was given up after the service's time limit."},
}


def build_app(
    rank: Callable[[RankingQuery], Awaitable[Pass[Ranked]]],
    health: HealthAnswer,
    options: ServiceOptions,
    examples: Sequence[Mapping[str, Any]],
) -> FastAPI:
    """Build the application.

    Args:
        rank: answers a query, or raises ``QueueFullError``.
        health: what ``/healthz`` says.
        options: limits and times.
        examples: request bodies for the OpenAPI page.
    """
    app = FastAPI(
        title="collm-dist",
        description="Ranks items for users of a run's log, and for users whom nobody has met, by their history.",
        redoc_url=None,
    )
    body_type = limit_body(options, examples)

    async def rank_items(body: RankBody) -> Response:
        """Rank items for a user, the best first.

        The headers say how the answer came about: `Server-Timing` how long the request waited and how long its pass
        took, in milliseconds, `X-Scored-Together` how many requests were scored in the pass.
        """
        if body.user is None and body.history is None:
            raise HTTPException(
                422, "user: name a user or give a history; an empty list stands for somebody of whom nothing is known"
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

    # The route's own type is only known now; an annotation cannot name it.
    rank_items.__annotations__["body"] = Annotated[body_type, Body()]
    errors = {status: {"model": ErrorAnswer, **about} for status, about in _ERRORS.items()}
    app.post("/rank", response_model=RankAnswer, responses=errors)(rank_items)

    @app.get("/healthz")
    async def read_health() -> HealthAnswer:
        """Say that the service can rank, and with which model."""
        return health

    _add_error_handlers(app, options)
    app.add_middleware(_BodyLimit, max_bytes=options.max_body_kib << 10)
    return app


def _add_error_handlers(app: FastAPI, options: ServiceOptions) -> None:
    """Let every error end in JSON with a ``detail``."""

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
            detail = "there is nothing here; POST /rank ranks, GET /healthz tells of the service, /docs explains"
        return _answer(error.status_code, detail, error.headers)

    @app.exception_handler(QueueFullError)
    async def answer_full(request: Request, error: QueueFullError) -> Response:
        return _answer(503, f"{options.max_waiting} requests wait already; try again in a second", _RETRY_AFTER)

    @app.exception_handler(TimeoutError)
    async def answer_late(request: Request, error: TimeoutError) -> Response:
        return _answer(
            504, f"given up after {options.request_timeout_s:g} s; name fewer candidates, or try again later"
        )

    @app.exception_handler(CollmError)
    async def answer_broken(request: Request, error: CollmError) -> Response:
        logger.error("%s: %s", error.name, error)
        return _answer(500, str(error))

    @app.exception_handler(Exception)
    async def answer_bug(request: Request, error: Exception) -> Response:
        return _answer(500, "internal error; the service's log has it")


def _is_json(content_type: str | None) -> bool:
    header = Header()
    header["content-type"] = content_type or ""
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _answer(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII: what a client has sent may not be text that UTF-8 can spell.
    content = json.dumps({"detail": detail})
    return Response(content, status, headers, media_type="application/json")


class _BodyLimit:
    """Refuses bodies that are too large, before they are read where their length is told."""

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
                    f"the body has more than {limit} KiB; send less, or start the service with a larger --max-body-kib",
                )
            return message

        await self._app(scope, receive_some, send)
