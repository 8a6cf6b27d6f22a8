"""Times of availability: columns of the item files, their bad rows, and the facts about them."""

from __future__ import annotations

import datetime
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.id_forms import unify_items
from collm_dist.data.ingest.id_tables import write_item_table
from collm_dist.data.ingest.input_checks import check_items
from collm_dist.data.ingest.input_preview import preview_rows
from collm_dist.data.ingest.source import open_source
from collm_dist.data.shards.availability import Availability
from collm_dist.errors import ConfigError, DataError
from collm_dist.runs.fingerprints import flatten_config
from tests.unit.test_lost_lines import CLICKS, write

DAY = 86_400
WINDOWS = {"available_from": "since", "available_until": "till"}


def build(folder, lines, header="item_id,title,since,till", **settings):
    """Return the settings of a log of a click whose item file has the lines, or is the given file."""
    path = write(folder / "log.csv", "user_id,item_id,timestamp", "u,a,1700000000")
    items = lines if isinstance(lines, str) else write(folder / "items.csv", header, *lines)
    columns = {"item_columns": WINDOWS}
    return DatasetConfig.model_validate({"path": path, "items_path": items, **columns, **CLICKS, **settings})


def read(folder, lines, **settings):
    return open_source(build(folder, lines, **settings)).read_items()


def list_times(table):
    return {row["item_id"]: (row["available_from"], row["available_until"]) for row in table.to_pylist()}


@pytest.mark.parametrize(
    ("since", "till", "settings"),
    [
        ("1970-01-02", "1970-01-03 00:00:00+00:00", {}),
        ("19700102", "99991231", {}),
        ("86400000", "172800000", {"timestamp_unit": "ms"}),
        ("02/01/1970", "03/01/1970", {"time_format": "%d/%m/%Y"}),
    ],
)
def test_times_are_read_in_the_forms_of_timestamps(tmp_path, since, till, settings):
    lines = [f"a,A,{since},{till}", f"b,B,{since},", "c,C,, NULL ", "d,D,,"]
    items = read(tmp_path, lines, **settings)
    until = 253_402_214_400 if till == "99991231" else 2 * DAY
    assert list_times(items.table) == {
        "a": (DAY, until), "b": (DAY, None), "c": (None, None), "d": (None, None)
    }  # fmt: skip
    assert not items.bad_rows.counts


def test_the_unit_is_that_of_the_first_rows_of_both_columns(tmp_path):
    lines = ["a,A,,1700000000000", "b,B,0,1800000000000", "c,C,,1700000000"]
    items = read(tmp_path, lines, max_bad_row_share=1.0)
    assert list_times(items.table) == {"a": (None, 1_700_000_000), "b": (0, 1_800_000_000)}
    assert items.bad_rows.examples[0].startswith(f"{tmp_path}/items.csv:4: till is not in ms")


def test_dates_of_parquet(tmp_path):
    day = datetime.date(1970, 1, 2)
    table = {"item_id": ["a", "b"], "title": ["A", "B"], "since": [None, day], "till": [day, None]}
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    items = read(tmp_path, str(tmp_path / "items.parquet"))
    assert list_times(items.table) == {"a": (None, DAY), "b": (DAY, None)}


def test_bad_times_are_counted_with_their_place_and_limited(tmp_path):
    lines = ["a,A,1970-01-02,", '"b",B,soon,', "c,C,1970-01-03,1970-01-03", "d,D,,x", "e,E,1970-01-04,1970-01-02"]
    items = read(tmp_path, lines)
    assert items.table.column("item_id").to_pylist() == ["a"]
    assert (items.rows_read, items.bad_rows.counts) == (5, {
        "since is not a time (dataset.item_columns.available_from)": 1,
        "till is not a time (dataset.item_columns.available_until)": 1,
        "till is not after since, so the item is never available": 2,
    })  # fmt: skip
    assert set(items.bad_rows.first.values()) == {
        f"{tmp_path}/items.csv:3 ('soon')",
        f"{tmp_path}/items.csv:5 ('x')",
        f"{tmp_path}/items.csv:4 ('1970-01-03')",
    }
    with pytest.raises(DataError, match=r"(?s)items_path: 4 of 5 item rows.*items\.csv:3: since is not a time.*'soon'"):
        check_items(build(tmp_path, lines), items)


def test_the_first_row_of_an_item_counts_and_others_are_reported(tmp_path):
    items = read(tmp_path, ["a,A,1970-01-02,", "a,A,1970-01-03,", "a,A,1970-01-02,"])
    assert list_times(items.table) == {"a": (DAY, None)}
    assert items.repairs == {"rows of an item with other times of availability": 1}


def test_the_item_table_has_times_only_if_they_are_set(tmp_path):
    lines = ["1.0,A,1970-01-02,", "2,B,,1970-01-02"]
    items = unify_items(read(tmp_path, lines).table)
    write_item_table(tmp_path / "with.parquet", ["2", "1", "3"], items)
    written = pq.read_table(tmp_path / "with.parquet")
    assert written.column("available_from").to_pylist() == [None, DAY, None]
    assert written.column("available_until").to_pylist() == [DAY, None, None]
    assert written.schema.field("available_from").type == pa.int64()
    only_until = {"item_columns": {"available_until": "till"}}
    write_item_table(tmp_path / "until.parquet", ["1"], read(tmp_path, lines, **only_until).table)
    assert pq.read_schema(tmp_path / "until.parquet").names == [
        "item_idx",
        "item_id",
        "title",
        "text",
        "available_until",
    ]
    write_item_table(tmp_path / "without.parquet", ["1"], read(tmp_path, lines, item_columns={}).table)
    assert pq.read_schema(tmp_path / "without.parquet").names == ["item_idx", "item_id", "title", "text"]


def test_wrong_settings_name_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"no column 'since' \(has item_id, title\)"):
        read(tmp_path, ["a,A"], header="item_id,title")
    with pytest.raises(ConfigError, match=r"item_columns\.available_from.*dataset\.items_path"):
        open_source(build(tmp_path, [], items_path=None))


def test_settings_that_are_not_set_are_not_in_fingerprints(tmp_path):
    names = {f"item_columns.{name}" for name in WINDOWS}
    assert names <= set(flatten_config(build(tmp_path, [])))
    assert not names & set(flatten_config(build(tmp_path, [], item_columns={})))


@pytest.mark.parametrize(
    ("until", "line", "warns"), [("9999-12-31", "1 items have|2 items are", False), ("1970-01-02", "0 items are", True)]
)
def test_the_preview_counts_windows_and_available_items(tmp_path, until, line, warns):
    lines = [f"a,A,,{until}", f"b,B,,{'' if not warns else until}"]
    shown = preview_rows(open_source(build(tmp_path, lines)))
    about = next(text for text in shown if text.startswith("availability: "))
    assert re.search(line.split("|")[-1] + " available now", about)
    assert any("no item of the item file is available now" in text for text in shown) == warns
    assert not any(
        "availability" in text for text in preview_rows(open_source(build(tmp_path, lines, item_columns={})))
    )


def test_windows_include_their_first_second_and_exclude_their_last():
    items = {"item_id": list("abcd"), "available_from": [10, None, 10, None], "available_until": [20, 20, None, None]}
    windows = Availability.read(items)
    assert [windows.find_available(now).tolist() for now in (9, 10, 19, 20)] == [
        [False, True, False, True], [True] * 4, [True] * 4, [False, False, True, True]
    ]  # fmt: skip
    assert windows.has_window.tolist() == [True, True, True, False]
    assert Availability.read({"item_id": ["a"]}) is None
    until = Availability.read({"item_id": ["a"], "available_until": [5]})
    assert np.array_equal(until.find_available(-(2**62)), [True])


def test_times_of_a_published_layout_and_of_a_delta_table(tmp_path):
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\ttimestamp:float", "u\ta\t1700000000")
    write(tmp_path / "x.item", "item_id:token\ttitle:token_seq\tsince:float\ttill:float", "a\tA\t86400\t", "b\tB\tx\t9")
    items = read(tmp_path, [], format="recbole", path=str(tmp_path), items_path=None, columns={})
    assert list_times(items.table) == {"a": (DAY, None)}
    assert items.bad_rows.examples[0].startswith(f"{tmp_path}/x.item:3: since is not a time")
    day = datetime.datetime(1970, 1, 2, tzinfo=datetime.UTC)
    table = pa.table({"item_id": ["a"], "title": ["A"], "since": [day], "till": pa.nulls(1, pa.date32())})
    write_deltalake(tmp_path / "items", table)
    assert list_times(read(tmp_path, str(tmp_path / "items")).table) == {"a": (DAY, None)}


@pytest.mark.parametrize(
    ("never", "later", "unit"),
    [
        ("99991231", "20300101", "YYYYMMDD"),
        ("253402300799", "1893456000", "s"),
        ("253402300799000", "1893456000000", "ms"),
        ("253402214400", "1893456000", "s"),
    ],
)
def test_never_is_never_even_if_all_first_rows_have_it(tmp_path, never, later, unit):
    source = open_source(build(tmp_path, [f"a,A,,{never}", "b,B,,", f"c,C,,{never}"]))
    assert source.windows.unit == source.describe()["item_times_unit"] == unit
    times = list_times(source.read_items().table)
    assert all(end is None or end >= 253_402_214_400 for _, end in times.values())
    mixed = read(tmp_path, [f"a,A,,{never}", f"b,B,,{never}", f"c,C,,{later}"])
    assert list_times(mixed.table)["c"] == (None, 1_893_456_000)
    assert not mixed.bad_rows.counts


def test_a_bad_row_is_counted_once(tmp_path):
    items = read(tmp_path, [",A,soon,", "b,B,1970-01-02,"])
    assert items.rows_read == 2
    assert sum(items.bad_rows.counts.values()) == 1
    assert items.repairs["items without an id"] == 1
