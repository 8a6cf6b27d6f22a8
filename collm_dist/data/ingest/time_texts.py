"""Times written as text: ISO 8601 and other forms that have one meaning only."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# Forms in which no day can be taken for a month. Others need dataset.time_format.
_FORMATS = (
    *(f"%Y{mark}%m{mark}%d{time}" for mark in "/." for time in ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f")),
    "%a, %d %b %Y %H:%M:%S%z",
    "%a, %d %b %Y %H:%M:%S",
    "%a %b %d %H:%M:%S%z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%d/%b/%Y:%H:%M:%S%z",
    *(f"{date}{time}" for date in ("%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y")
      for time in ("", " %H:%M", " %H:%M:%S")),
)  # fmt: skip
_UTC = re.compile(r"\s*(?:[+-]00:?00)?\s*\b(?:UTC|GMT|utc|gmt)$")
_OFFSET = re.compile(r"\s+([+-]\d\d:?\d\d)(?=$| \d{4}$)")
_DIGITS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


def parse_times(texts: Any, time_format: str | None = None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return seconds since 1970 and a mask of the texts that are times. Without an offset, times are UTC.

    Args:
        texts: a pandas series of strings and None.
        time_format: directives of strptime, instead of the known forms.
    """
    if time_format is not None:
        return _to_seconds(pd.to_datetime(texts.str.strip(), format=time_format, utc=True, errors="coerce"))
    texts = texts.str.strip()
    seconds, valid = _to_seconds(pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce"))
    if valid.all():
        return seconds, valid
    plain = texts.str.replace(_UTC, "", regex=True).str.replace(_OFFSET, r"\1", regex=True)
    for known in ("ISO8601", *_FORMATS):
        open_rows = np.flatnonzero(~valid)
        found, parsed = _to_seconds(pd.to_datetime(plain.iloc[open_rows], format=known, utc=True, errors="coerce"))
        seconds[open_rows[parsed]] = found[parsed]
        valid[open_rows[parsed]] = True
        if valid.all():
            break
    return seconds, valid


def parse_digits(texts: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return seconds since 1970 and a mask of the texts that are dates in digits, YYYYMMDD with or without HHMM[SS]."""
    texts = texts.str.strip().str.replace(r"\.0+$", "", regex=True)
    seconds, valid = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    lengths = texts.str.len().to_numpy(dtype=np.float64, na_value=0)
    for length, known in _DIGITS.items():
        rows = np.flatnonzero(lengths == length)
        if len(rows):
            seconds[rows], valid[rows] = _to_seconds(
                pd.to_datetime(texts.iloc[rows], format=known, utc=True, errors="coerce")
            )
    return seconds, valid


def are_digit_dates(values: NDArray[np.float64]) -> bool:
    """Return whether all finite numbers are dates in digits, of the years 1900 to 2100."""
    finite = values[np.isfinite(values)]
    if not len(finite) or (finite != np.floor(finite)).any():
        return False
    for length in _DIGITS:
        if ((finite >= 1900 * 10.0 ** (length - 4)) & (finite < 2101 * 10.0 ** (length - 4))).all():
            texts = pd.Series(finite.astype(np.int64).astype(str))
            return bool(parse_digits(texts)[1].all())
    return False


def _to_seconds(dates: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    valid = dates.notna().to_numpy()
    seconds = np.zeros(len(dates), np.int64)
    seconds[valid] = dates[valid].dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype(np.int64)
    return seconds, np.array(valid, dtype=bool)
