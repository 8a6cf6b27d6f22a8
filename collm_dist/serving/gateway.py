"""Gateway: ASGI middleware around the HTTP proxy of Ray Serve, and limits on how slowly a client may send.

The proxy answers some errors itself, in plain text. The gateway turns them into JSON, and repeats a request whose
replica died: rankings change nothing, and events count once, so they may run twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collm_dist.serving.access import Access, hash_token
from collm_dist.serving.header_time import limit_header_time
from collm_dist.serving.http_errors import RETRY_AFTER, answer_error, answer_slow
from collm_dist.serving.service_options import ServiceOptions

logger = logging.getLogger(__name__)

# For Ray Serve, which imports the function in the process of each proxy.
IMPORT_PATH = "collm_dist.serving.gateway:build_middlewares"
_ENVIRONMENT = "COLLM_DIST_GATEWAY"
# Of uvicorn: proxies whose X-Forwarded-For names the client.
_TRUSTED_PROXIES = "FORWARDED_ALLOW_IPS"
# Serve's time limit lies above the application's, which answers with more detail.
_GRACE_S = 5.0
# A request that killed two replicas would kill the third.
_ATTEMPTS = 2
# Serve lets clients set its time limit and more by headers, and fails on some that are not UTF-8.
_TIMEOUT_HEADER = b"x-request-timeout-seconds"
_SERVE_HEADERS = (
    _TIMEOUT_HEADER,
    b"x-request-disconnect-disabled",
    b"x-request-id",
    b"serve-multiplexed-model-id",
    b"x-session-id",
)


def build_environment(options: ServiceOptions, token: str | None) -> dict[str, str]:
    """Return the environment variable that carries the gateway's limits into the processes of the proxies.

    Ray shows environment variables to whoever may use the cluster, so it has the hash of the token.
    """
    limits = {
        "receive_timeout_s": options.receive_timeout_s,
        "request_timeout_s": options.request_timeout_s + _GRACE_S,
        "max_body_kib": options.max_body_kib,
        "token_hash": None if token is None else hash_token(token),
        "max_requests_per_minute": options.max_requests_per_minute,
    }
    # Otherwise a client on this machine, or behind a proxy on it, could count as any address that it names.
    trusted = {_TRUSTED_PROXIES: os.environ.get(_TRUSTED_PROXIES, "")}
    return {_ENVIRONMENT: json.dumps(limits), **trusted}


def build_middlewares() -> list[Middleware]:
    """Return the middlewares of the proxy in this process, and limit the time for request headers there."""
    limits = json.loads(os.environ[_ENVIRONMENT])
    limit_header_time(limits["receive_timeout_s"])
    access = Access(limits.pop("token_hash"), limits.pop("max_requests_per_minute"))
    return [Middleware(Gateway, access=access, **limits)]


class Gateway:
    """ASGI middleware: reads the body within limits, forwards the request, repeats it if its replica dies."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        receive_timeout_s: float,
        request_timeout_s: float,
        max_body_kib: int,
    ) -> None:
        """Store the application and the limits.

        Args:
            app: application that may answer in plain text, or not at all if a process died.
            access: decides who may ask, and how often.
            receive_timeout_s: seconds for receiving the body.
            request_timeout_s: seconds from there to the answer, over all attempts.
            max_body_kib: largest body in KiB.
        """
        self._app, self._access, self._max_body_kib = app, access, max_body_kib
        self._receive_timeout_s, self._request_timeout_s = receive_timeout_s, request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":  # the service has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = self._access.refuse(scope) or await self._read_body(scope, receive)
        if body is None:  # the client is gone
            return
        if isinstance(body, Response):
            await body(scope, receive, send)
            return
        exchange = _Exchange(self._app, scope, body, receive)
        deadline = asyncio.get_running_loop().time() + self._request_timeout_s
        for _ in range(_ATTEMPTS):
            remaining_s = deadline - asyncio.get_running_loop().time()
            if exchange.is_over or remaining_s <= 0:
                break
            await exchange.run(remaining_s)
        if exchange.is_disconnected:
            return
        failure = self._explain(exchange.messages)
        if failure is not None:
            await failure(scope, receive, send)
            return
        for message in exchange.messages:
            await send(message)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | Response | None:
        """Return the body; the error that ends the request; or None if the client disconnected.

        A body whose declared length is too large is not read.
        """
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        max_bytes, body, is_complete = self._max_body_kib << 10, b"", False
        too_large = answer_error(
            413,
            f"the body exceeds {self._max_body_kib} KiB; send less, or start the service with a larger --max-body-kib",
        )
        if declared.isdigit() and int(declared) > max_bytes:
            return too_large
        try:
            async with asyncio.timeout(self._receive_timeout_s):
                while not is_complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    is_complete = not message.get("more_body", False)
                    if len(body) > max_bytes:
                        return too_large
        except TimeoutError:
            return answer_slow(f"the body did not arrive within {self._receive_timeout_s:g} s")
        return body

    def _explain(self, messages: list[Message]) -> Response | None:
        """Return the error that replaces an answer in plain text or a missing answer, else None."""
        if not messages:
            return answer_error(
                503, "the process that worked on the request ended and is being restarted; try again", RETRY_AFTER
            )
        status, headers = messages[0]["status"], dict(messages[0]["headers"])
        if status < 400 or headers.get(b"content-type", b"").startswith(b"application/json"):
            return None
        if status == 408:  # of Serve, with the whole body received
            detail = f"no model was free within {self._request_timeout_s:g} s"
        else:
            detail = "the service is starting, stopping or overloaded"
        retry_after = headers.get(b"retry-after", b"").decode("latin-1")
        return answer_error(503, f"{detail}; try again", {"Retry-After": retry_after} if retry_after else RETRY_AFTER)


class _Exchange:
    """Attempts to get an answer to one request.

    Attributes:
        messages: the complete answer, or empty.
        is_disconnected: whether the client is gone.
    """

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive) -> None:
        self._app, self._scope, self._body, self._receive = app, scope, body, receive
        self.messages: list[Message] = []
        self.is_disconnected = False

    @property
    def is_over(self) -> bool:
        return self.is_disconnected or bool(self.messages)

    async def run(self, timeout_s: float) -> None:
        """Ask the application once; an incomplete answer is dropped."""
        is_read, sent = False, list[Message]()

        async def replay() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": self._body, "more_body": False}
            message = await self._receive()
            self.is_disconnected |= message["type"] == "http.disconnect"
            return message

        async def keep(message: Message) -> None:
            sent.append(message)

        headers = [item for item in self._scope["headers"] if item[0].replace(b"_", b"-") not in _SERVE_HEADERS]
        headers.append((_TIMEOUT_HEADER, f"{timeout_s:.3f}".encode()))
        try:
            await self._app({**self._scope, "headers": headers}, replay, keep)
        except Exception:
            logger.exception("a request failed in the proxy")
        if sent and sent[-1]["type"] == "http.response.body" and not sent[-1].get("more_body", False):
            self.messages = sent
