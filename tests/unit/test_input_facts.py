"""Facts of the input: what the preview and the data step show of it, and what they warn about."""

from __future__ import annotations

import time

import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.input_preview import preview_rows
from collm_dist.data.ingest.source import open_source

HEADER = "user_id,item_id,timestamp,rating"
ITEMS = "item_id,title\na,Alien\nb,Brazil\nc,c\n"
ROWS = ["u1,a,1000000000,5", "u1,b,1000000060,2.5", "u2,a,1000086400,4", "u3,c,1000086401,1", "u3,d,1000086402,x"]


def preview(folder, rows=ROWS, items=ITEMS, header=HEADER, max_rows=1000, **settings) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "items.csv").write_text(items or "")
    dataset = {"path": str(folder / "log.csv"), "items_path": str(folder / "items.csv") if items else None}
    columns = {"columns": {"rating": "rating"}} if "columns" not in settings else {}
    return preview_rows(open_source(DatasetConfig.model_validate({**dataset, **columns, **settings})), max_rows)


def test_a_log_at_a_glance(tmp_path):
    assert preview(tmp_path) == [
        "facts of all 5 rows, 4 of them usable:",
        "times: 2001-09-09 01:46:40 to 2001-09-10 01:46:41 (UTC)",
        "likes: 50.0% of the rows; ratings from 1 to 5, a like is at least 4",
        "users: 3, 66.7% of them with one event only",
        "items: 3, 66.7% of them with a title",
        "row: user u1 | item a | 2001-09-09 01:46:40 | like | Alien",
        "row: user u1 | item b | 2001-09-09 01:47:40 | dislike | Brazil",
        "row: user u2 | item a | 2001-09-10 01:46:40 | like | Alien",
        f"left out: 1 rows, rating is not a number (for example {tmp_path}/log.csv:6 ('x'))",
    ]


def test_a_long_log_is_read_in_part_and_clicks_have_neither_ratings_nor_times(tmp_path):
    # Blocks of 8 MiB: two of them.
    rows = [f"u{number},a,{'1' * 40}" for number in range(170_000)]
    settings = {"feedback": "implicit", "columns": {"timestamp": None}}
    lines = preview(tmp_path, rows, None, "user_id,item_id,note", max_rows=1, **settings)
    assert lines[0].startswith("facts of the first 1")
    assert "the data step reads all" in lines[0]
    assert lines[1] == "likes: every row (dataset.feedback: implicit)"
    assert lines[-1] == "row: user u2 | item a | like | no title"


def warnings(*arguments, **settings) -> str:
    return "\n".join(line for line in preview(*arguments, **settings) if line.startswith("WARNING"))


def test_times_that_cannot_be_are_named(tmp_path):
    assert warnings(tmp_path) == ""
    wrong = [ROWS[0], "u1,b,17000,2"]
    assert "1 of 2 rows have a time before 1995, the earliest 1970-01-01 04:43:20" in warnings(tmp_path, wrong)
    late = [*ROWS, f"u4,a,{int(time.time()) + 200_000},5"]
    assert "1 of 5 rows have a time after tomorrow" in warnings(tmp_path, late)


def test_times_without_their_last_digits_are_named(tmp_path):
    cut = [f"u{number},a,1.{600001 + 10 * number}E+09,{number % 5}" for number in range(1, 31)]
    assert "30 of 30 times end with three zeros" in warnings(tmp_path, cut)
    days = [f"u{number},a,2021-01-0{number},{number}" for number in range(1, 6)]
    assert warnings(tmp_path, days) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"like_threshold": 0.5}, "every row is a like: the ratings are 1 to 5 and dataset.like_threshold is 0.5"),
        ({"like_threshold": 9}, "no row is a like: the ratings are 1 to 5 and dataset.like_threshold is 9"),
    ],
)
def test_rows_of_one_class_are_named(tmp_path, settings, message):
    assert message in warnings(tmp_path, **settings)


def test_swapped_columns_are_named(tmp_path):
    swapped = {"columns": {"rating": "rating", "user_id": "item_id", "item_id": "user_id"}}
    assert "100% of the user ids are ids of the item file, and 0% of the item ids" in warnings(tmp_path, **swapped)
    numbers = [f"{user},{item},{10**9 + user},{item}" for user in range(1, 9) for item in range(1, 6)]
    titles = "item_id,title\n" + "".join(f"{item},T{item}\n" for item in range(1, 6))
    assert warnings(tmp_path, numbers, titles) == ""
    assert "probably swapped" in warnings(tmp_path, numbers, titles, **swapped)
