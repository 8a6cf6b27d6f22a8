"""Checks of the input: errors with counts, examples and the setting to change."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.file_format import BadRows
from collm_dist.data.ingest.input_checks import check_reads, check_splits
from collm_dist.data.manifest_record import drop_examples
from collm_dist.errors import DataError

NOW = int(time.time())
RECORD = {"dropped": {"user (id) is in scientific notation": 1}, "input": {"facts": {"rows": 1, "sample_rows": ["u7"]}}}
READ = {"rows_read": 100, "usable": 98, "bad": {"time is not a time": 2}, "examples": ["a.csv:7: time is not a time"],
        "last": NOW - 7200}  # fmt: skip


def dataset(**settings: Any) -> DatasetConfig:
    return DatasetConfig(path="a.csv", columns={"rating": "rating"}, **settings)


def test_good_data_passes():
    expect = {"min_rows": 100, "max_age_hours": 3, "max_row_change_share": 0.5}
    check_reads(dataset(max_bad_row_share=0.02, expect=expect), [READ], {}, 80)


@pytest.mark.parametrize(
    ("settings", "unknown", "previous", "message"),
    [
        (
            {},
            {},
            0,
            r"2 of 100 rows .*2 x time is not a time.*max_bad_row_share=0.01.*set dataset.time_format\)[^$]*a.csv:7",
        ),
        ({"max_bad_row_share": 0.03}, {"q": 5}, 0, r"7 of 100 rows .*5 x unknown item[^$]*item 'q'"),
        ({"expect": {"min_rows": 101}}, {}, 0, r"expect.min_rows: the input has 100 rows"),
        (
            {"expect": {"max_age_hours": 1.5}},
            {},
            0,
            r"expect.max_age_hours: the newest interaction is 2.[0-4] hours old",
        ),
        ({"expect": {"max_row_change_share": 0.1}}, {}, 80, r"max_row_change_share: 100 rows against 80.*25%"),
    ],
)
def test_broken_promises_are_named(settings, unknown, previous, message):
    settings = {"max_bad_row_share": 0.02, **settings} if settings else settings
    with pytest.raises(DataError, match=message):
        check_reads(dataset(**settings), [READ], unknown, previous)


def test_unusable_rows_come_with_their_possible_reason():
    with pytest.raises(DataError, match=r"5 x unknown item[^$]*Possible reason: the columns are swapped$"):
        check_reads(dataset(), [READ], {"q": 5}, 0, ["the columns are swapped"])


def test_nothing_to_use():
    with pytest.raises(DataError, match="no rows"):
        check_reads(dataset(), [{**READ, "rows_read": 0, "bad": {}}], {}, 0)
    with pytest.raises(DataError, match="none of the 100 rows"):
        check_reads(dataset(), [{**READ, "usable": 0, "bad": {}}], {}, 0)


def test_an_empty_split_is_named():
    rows = {"train": Counter(real_rows=5), "valid": Counter(), "test": Counter(real_rows=1)}
    with pytest.raises(DataError, match=r"'valid' is empty .*train 5, valid 0, test 1.*valid_ratio"):
        check_splits(dataset(), rows)


def test_the_share_is_of_the_rows_that_are_used():
    filtered = READ | {"rows_read": 10_000, "usable": 38}
    with pytest.raises(DataError, match="2 of 40 rows"):
        check_reads(dataset(max_bad_row_share=0.02), [filtered], {}, 0)
    lost = READ | {"rows_read": 0, "usable": 0, "bad": {"wrong number of columns": 12}}
    with pytest.raises(DataError, match="12 of 12 rows"):
        check_reads(dataset(), [lost], {}, 0)


def test_a_users_id_is_in_no_example_of_a_record():
    cause, bad_rows = next(iter(RECORD["dropped"])), BadRows()
    bad_rows.add(cause, 1, "a: b (c).csv:7", "9.78E+12")
    bad_rows.add("another cause", 1, "b.csv:8")
    shown = {"bad_examples": bad_rows.examples, "dropped_examples": bad_rows.first, "rows": 2}
    texts = {"rows": {cause: 1}, "examples": {cause: "b.csv:3 ('u7')"}}
    written = drop_examples(RECORD | {"input": RECORD["input"] | shown, "user_texts": texts})
    assert written["input"] == {
        "bad_examples": [f"a: b (c).csv:7: {cause}", "b.csv:8: another cause"], "facts": {"rows": 1}, "rows": 2
    }  # fmt: skip
    assert written["user_texts"] == {"rows": {cause: 1}}
