"""Errors of requests that several functions raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from collm_dist.errors import RequestError


def check_count(count: int) -> None:
    """Check the number of items to retrieve.

    Raises:
        RequestError: it is less than 1.
    """
    if count < 1:
        raise RequestError(f"candidates: {count} items cannot be retrieved; give a number of at least 1")


@contextmanager
def naming_request(place: int, count: int) -> Iterator[None]:
    """Prefix errors with the index of the request, if there are several."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"request {place}: {error}" if count > 1 else str(error)) from None
