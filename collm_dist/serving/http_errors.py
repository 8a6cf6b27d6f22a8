"""Errors of the service as JSON with a ``detail``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

RETRY_AFTER = {"Retry-After": "1"}


def answer_error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as JSON."""
    # ASCII, because a client may send lone surrogates, which UTF-8 cannot encode.
    return Response(json.dumps({"detail": detail}), status, headers, media_type="application/json")


def answer_slow(reason: str) -> Response:
    """Return the error of a request that arrives too slowly."""
    return answer_error(
        408,
        f"{reason}; send it faster, or start the service with a larger --receive-timeout-s",
        {"Connection": "close"},
    )
