"""Ids as requests give them: strings, or whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collm_dist.errors import RequestError

Id = str | int | float


def to_ids(values: Sequence[Id], field: str) -> list[str]:
    """Return a list of ids as strings; ``RequestError`` for any other value."""
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise RequestError(f"{field}: {values!r} is not a list of ids")
    return [to_id(value, field) for value in values]


def to_id(value: Id, field: str) -> str:
    """Return an id as a string; ``RequestError`` for any other value."""
    if (number := to_whole_number(value)) is not None:
        return str(number)
    if not isinstance(value, str):
        raise RequestError(f"{field}: {value!r} is not an id; ids are strings or integers")
    return value


def to_whole_number(value: Any) -> int | None:
    """Return an id that is a whole number, also a float such as 17.0, as an integer; None for other values."""
    if isinstance(value, float | np.floating):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2.0**53 else None
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None
