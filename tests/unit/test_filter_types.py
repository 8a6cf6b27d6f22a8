"""Types are decided once per source: of the columns in row filters, and of ids."""

from __future__ import annotations

import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.row_filter import parse_row_filter
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import CollmError, ConfigError
from tests.unit.test_lost_lines import CLICKS, write
from tests.unit.test_readers import read

HEADER = "user_id,item_id,timestamp,category,price,verified"


def keep(path, row_filter):
    return read(path=str(path), row_filter=row_filter, **CLICKS)[0]["user_id"].tolist()


@pytest.mark.parametrize(
    ("row_filter", "kept"),
    [
        ("category == 'S'", ["u3"]),
        ("category == '0'", ["u0"]),
        ("category == '007'", ["u1"]),
        ("category in ['S', '007']", ["u1", "u3"]),
        ("category == 7", ["u1", "u2"]),
        ("category == 7 or category == 'S'", ["u1", "u2", "u3"]),
        ("price > 2", ["u2", "u3"]),
        ("price < 2.5", ["u0"]),
        ("verified == True", ["u0", "u2"]),
        ("verified != true", ["u1", "u3"]),
        ("text(price) == '-'", ["u1"]),
        ("price in [1, 2.5]", ["u0", "u2"]),
        ("number(category) >= 0 and not (price < 2)", ["u2"]),
        ("price is None", []),
    ],
)
def test_columns_are_compared_as_the_filter_says(tmp_path, row_filter, kept):
    (tmp_path / "log").mkdir()
    write(tmp_path / "log" / "a.csv", HEADER, "u0,i,7,0,1,true", "u1,i,8,007,-,False")
    write(tmp_path / "log" / "b.csv", HEADER, "u2,i,9,7,2.5,True", "u3,i,9,S,3,0")
    assert keep(tmp_path / "log", row_filter) == kept


def count_misfits(path, row_filter):
    source = open_source(DatasetConfig.model_validate({"path": path, "row_filter": row_filter, **CLICKS}))
    (batch,) = [batch for chunk in source.chunks for batch in source.read_chunk(chunk)]
    return batch.table.num_rows, batch.bad, batch.bad_examples, batch.notes


@pytest.mark.parametrize(
    ("row_filter", "kept", "bad"),
    [
        ("price > 0", 1, 2),
        ("price > 0 or category == 'S'", 2, 1),  # true whatever the price is
        ("category == 'S' and price > 0", 0, 1),
        ("price in [1, 2]", 1, 2),
        ("not (price in [1, 2])", 0, 2),
        ("price not in [3]", 1, 2),
        ("price > 0 and category > 0", 0, 2),
        ("number(price) > 0", 1, 0),
        ("price is None", 0, 0),
    ],
)
def test_rows_whose_filter_depends_on_no_number_are_bad(tmp_path, row_filter, kept, bad):
    path = write(tmp_path / "a.csv", HEADER, "u0,i,7,0,1,true", "u1,i,8,007,-,False", "u2,i,9,S,free,true")
    rows, counts, examples, notes = count_misfits(path, row_filter)
    assert (rows, counts.total()) == (kept, bad)
    if row_filter == "price > 0":
        assert counts == {"price is not a number (dataset.row_filter)": 2}
        assert examples == [f"{path}:3: price is not a number (dataset.row_filter) ('-')"]
    if row_filter == "number(price) > 0":
        assert notes == {"price is not a number (dataset.row_filter)": 2}


def test_typed_columns_keep_their_meaning(tmp_path):
    table = pa.table({"user_id": ["a", "b"], "item_id": [9007199254740993, 7], "timestamp": [7, 8],
                      "on": [True, False], "x": [7.0, 1.5]})  # fmt: skip
    pq.write_table(table, tmp_path / "log.parquet")
    for row_filter in ("item_id == 9007199254740993", "item_id == '9007199254740993'", "on == true", "on == 1",
                       "on == 'true'", "x == '7'", "x == 7", "x in [7]", "x > 1.5", "item_id > timestamp"):  # fmt: skip
        assert keep(tmp_path / "log.parquet", row_filter) == ["a"], row_filter


def test_columns_compared_with_each_other_have_one_type(tmp_path):
    header = "user_id,item_id,timestamp,low,high"
    path = write(tmp_path / "log.csv", header, "a,i,7,9,10", "b,i,7,10,9")
    assert keep(path, "low < high") == ["a"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [("a = 'b'", "write == for"), ("a == 'x=1' && b == 2", "write 'and' for &"), ("a <> 1", "write !="),
     ("a == 1 OR b == 2", "lower case"), ("a IS NOT NULL", "lower case"), ("!a == 1", "write 'not'")],
)  # fmt: skip
def test_what_is_meant_is_said(text, hint):
    with pytest.raises(ConfigError, match=hint):
        parse_row_filter(text)


def test_a_column_of_text_is_not_compared_with_numbers(tmp_path):
    path = write(tmp_path / "log.csv", HEADER, "u0,i,7,S,1,true")
    with pytest.raises(CollmError, match=r"'category' with a number, and it holds text \('S'\).*number\(category\)"):
        keep(path, "category > 3")
    assert keep(path, "number(category) > 3") == []


def test_numbers_are_the_same_id_in_every_type_of_file_and_texts_stay_as_written(tmp_path):
    (tmp_path / "log").mkdir()
    write(tmp_path / "log" / "a.csv", "user_id,item_id,timestamp", "17,007,7", "v1.0,1.50,7")
    write(tmp_path / "log" / "b.csv", "user_id,item_id,timestamp", "17.0,007,7", "-3.00,1.50,7")
    columns = {"user_id": [17.0, 2.5, float("nan")], "item_id": ["007", "1.50", "x"], "timestamp": [7, 7, 7]}
    pq.write_table(pa.table(columns), tmp_path / "log" / "c.parquet", row_group_size=1)
    decimals = pa.array([decimal.Decimal("17.00")], pa.decimal128(10, 2))
    pq.write_table(pa.table({"user_id": decimals, "item_id": [7], "timestamp": [7]}), tmp_path / "log" / "d.parquet")
    write(tmp_path / "log" / "e.jsonl", '{"user_id": 17.0, "item_id": 7, "timestamp": 7}',
          '{"user_id": "17.0", "item_id": "7.0", "timestamp": 7}')  # fmt: skip
    rows, bad, _ = read(path=str(tmp_path / "log"), **CLICKS)
    users = rows["user_id"].tolist()
    assert users == ["17", "v1.0", "17.0", "-3.00", "17", "2.5", "17", "17", "17.0"]
    assert rows["item_id"].tolist()[:7] == ["007", "1.50", "007", "1.50", "007", "1.50", "7"]
    assert bad == {"missing user_id": 1}


def test_names_that_are_not_words_stand_in_backquotes(tmp_path):
    path = write(tmp_path / "a.csv", "user_id,item_id,timestamp,Book-Rating,in,a b", "u0,i,7,0,x,`q`", "u1,i,8,5,y,z")
    assert keep(path, "`Book-Rating` > 0") == ["u1"]
    assert keep(path, "text(`Book-Rating`) == '0' and `in` == 'x' and `a b` == '`q`'") == ["u0"]
    with pytest.raises(CollmError, match=r"no column 'Book_Rating'.*did you mean 'Book-Rating'"):
        keep(path, "`Book_Rating` > 0")
    with pytest.raises(ConfigError, match=r"expected a condition at character 23 of '`Book-Rating` > 0 and `a b`'"):
        keep(path, "`Book-Rating` > 0 and `a b`")
    with pytest.raises(ConfigError, match="row_filter"):
        keep(path, "`a b` == `")
