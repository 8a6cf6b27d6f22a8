"""Split rules: windows, shares and ties."""

from __future__ import annotations

import numpy as np
import pytest

from collm_dist.config import SplitConfig
from collm_dist.data.samples.splits import (
    OUTSIDE,
    add_months,
    build_amazon_book_rule,
    build_calendar_rule,
    build_ratio_rule,
)


def seconds(*dates: str) -> np.ndarray:
    return np.array([np.datetime64(date, "s").astype(np.int64) for date in dates])


def test_calendar_windows_are_utc_months_from_the_first_month():
    """The paper's ML-1M: months 14-23, 24-28 and 29-33 after April 2000, the month of the first rating."""
    rule = build_calendar_rule(SplitConfig(method="calendar"), int(seconds("2000-04-25T23:05:32")[0]))
    times = seconds(
        "2000-04-25", "2001-05-31T23:59:59", "2001-06-01", "2002-03-31T23:59:59", "2002-04-01", "2002-08-31T23:59:59",
        "2002-09-01", "2003-01-31T23:59:59", "2003-02-01",
    )  # fmt: skip
    assert rule.assign(times, np.arange(9)).tolist() == [OUTSIDE, OUTSIDE, 0, 0, 1, 1, 2, 2, OUTSIDE]


def test_calendar_windows_may_leave_gaps():
    split = SplitConfig(method="calendar", train_months=(0, 0), valid_months=(2, 2), test_months=(4, 5))
    rule = build_calendar_rule(split, int(seconds("1999-12-31")[0]))
    times = seconds("1999-12-01", "2000-01-15", "2000-02-29", "2000-03-01", "2000-05-31", "2000-06-01")
    assert rule.assign(times, np.arange(6)).tolist() == [0, OUTSIDE, 1, OUTSIDE, 2, OUTSIDE]
    assert add_months(int(seconds("1999-12-31T12:00:00")[0]), 2) == seconds("2000-02-01")[0]


def test_amazon_book_cuts_december_into_equal_halves_of_rows():
    times = seconds("2016-12-31T23:59:59", "2017-01-01", "2017-11-30T23:59:59", "2017-12-01", "2017-12-03",
                    "2017-12-03", "2017-12-03", "2017-12-31T23:59:59", "2017-12-02", "2018-01-01")  # fmt: skip
    rows = np.arange(10)
    december = (times >= times[3]) & (times < times[9])
    rule = build_amazon_book_rule(times[december], rows[december])
    assert rule.assign(times, rows).tolist() == [OUTSIDE, 0, 0, 1, 1, 2, 2, 2, 1, OUTSIDE]
    none = build_amazon_book_rule(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert none.assign(times, rows).max() == 1  # no rows in December: the test split is empty


@pytest.mark.parametrize("num_rows", [10, 11, 97, 1000])
@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.7, 0.1), (0.999, 0.0005), (0.1, 0.7)])
def test_ratio_takes_the_earliest_share(num_rows, shares):
    times = np.arange(num_rows) * 3
    rule = build_ratio_rule(
        SplitConfig(train_ratio=shares[0], valid_ratio=shares[1]), times, np.ones(num_rows, np.int64)
    )
    found = np.bincount(rule.assign(times, times), minlength=3)
    ends = [int(num_rows * share + 1e-6) for share in (shares[0], sum(shares))]
    assert found.tolist() == [ends[0], ends[1] - ends[0], num_rows - ends[1]]


def test_ratio_never_divides_a_second():
    times, counts = np.array([1, 2, 3, 4]), np.array([1, 6, 2, 1])
    rule = build_ratio_rule(SplitConfig(train_ratio=0.5, valid_ratio=0.3), times, counts)
    assert rule.assign(times, np.array([50, 0, 7, 9])).tolist() == [0, 1, 2, 2]
