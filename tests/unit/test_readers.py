"""Readers on small files in the original formats of published datasets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.file_format import PACKED_SUFFIXES, FileFormat
from collm_dist.data.ingest.file_readers import find_kind
from collm_dist.data.ingest.item_texts import clean_text
from collm_dist.data.ingest.normalize import guess_unit
from collm_dist.data.ingest.row_filter import parse_row_filter
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import CollmError, ConfigError


def read(**dataset) -> tuple[pd.DataFrame, dict, list[str]]:
    """Return all rows, the counts of bad rows, and their examples."""
    source = open_source(DatasetConfig.model_validate(dataset))
    tables, bad, examples = [], {}, []
    for chunk in source.chunks:
        for batch in source.read_chunk(chunk):
            tables.append(batch.table)
            examples += batch.bad_examples
            for cause, count in batch.bad.items():
                bad[cause] = bad.get(cause, 0) + count
    return pa.concat_tables(tables).to_pandas(), bad, examples


def items_of(**dataset) -> dict[str, str]:
    table = open_source(DatasetConfig.model_validate(dataset)).read_items().table.to_pandas()
    return dict(zip(table["item_id"], table["text"], strict=True))


RATINGS = {"columns": {"rating": "rating"}}


def write_csv(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_csv_with_everything_wrong_that_happens(tmp_path):
    text = "\ufeffuser_id,item_id,timestamp,rating\n"
    text += "1,a,1000000000,5\n,a,1000000001,5\n1,b,2001-09-09T01:46:42Z,3.5\n1,c,whenever,5\n1,d,1000000004,NaN\n"
    text += "1,e,1000000005\n9223372036854775808,f,1000000006,4\n 1 ,g,1000000007,4\n"
    rows, bad, examples = read(path=write_csv(tmp_path / "log.csv", text), **RATINGS)
    assert rows["user_id"].tolist() == ["1", "1", "9223372036854775808", "1"]
    assert rows["item_id"].tolist() == ["a", "b", "f", "g"]
    assert rows["timestamp"].tolist() == [1_000_000_000, 1_000_000_002, 1_000_000_006, 1_000_000_007]
    assert rows["label"].tolist() == [1, 0, 1, 1]
    assert bad == {
        "missing user_id": 1,
        "timestamp is not a time": 1,
        "rating is not a number": 1,
        "wrong number of columns": 1,
    }
    assert any("log.csv:3: missing user_id (empty)" in example for example in examples)


def test_undecodable_bytes_are_replaced(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"user_id,item_id,timestamp,rating\n1,caf\xe9,1000000000,5\n")
    rows, bad, _ = read(path=str(tmp_path / "log.csv"), **RATINGS)
    assert rows["item_id"].tolist() == ["caf\ufffd"]
    assert not bad


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units_of_timestamps_are_guessed(tmp_path, unit, factor):
    text = f"user_id,item_id,timestamp,rating\n1,a,{1_600_000_000 * factor},5\n"
    path = write_csv(tmp_path / "log.csv", text)
    assert open_source(DatasetConfig.model_validate({"path": path, **RATINGS})).timestamp_unit == unit
    assert read(path=path, **RATINGS)[0]["timestamp"].tolist() == [1_600_000_000]


def test_parquet_folders_with_partitions_and_row_groups(tmp_path):
    for day, users in (("2024-01-01", [1, 2]), ("2024-01-02", [3])):
        folder = tmp_path / f"day={day}"
        folder.mkdir()
        table = pa.table({"u": users, "i": ["x"] * len(users), "ts": pa.array([0] * len(users), pa.timestamp("ms"))})
        pq.write_table(table, folder / "part.parquet", row_group_size=1)
    columns = {"user_id": "u", "item_id": "i", "timestamp": "ts"}
    rows, _, _ = read(path=str(tmp_path), columns=columns, feedback="implicit", row_filter="day == '2024-01-02'")
    assert rows["user_id"].tolist() == ["3"]
    rows, _, _ = read(path=f"{tmp_path}/*/part.parquet", columns=columns, feedback="implicit")
    assert rows["user_id"].tolist() == ["1", "2", "3"]
    assert rows["label"].tolist() == [1, 1, 1]


def test_other_file_systems(tmp_path):
    path = write_csv(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,a,1000000000,5\n")
    assert len(read(path=f"file://{path}", **RATINGS)[0]) == 1
    import fsspec

    with fsspec.open("memory://logs/log.csv", "w") as file:
        file.write(Path(path).read_text())
    assert len(read(path="memory://logs/log.csv", **RATINGS)[0]) == 1


@pytest.mark.parametrize(("codec", "suffixes"), PACKED_SUFFIXES.items())
def test_the_type_of_a_packed_file_is_that_of_the_file_in_it(tmp_path, codec, suffixes):
    for suffix in suffixes:
        for name, kind in (("a.jsonl", "json"), ("a.CSV", "text"), ("a.pq", "parquet"), ("a.dat", "text")):
            assert find_kind(f"s3://bucket/{name}{suffix}?region=x", FileFormat()) == kind
        path = tmp_path / f"a.jsonl{suffix}"
        with pa.output_stream(path, compression=codec) as file:
            file.write(b'{"user_id": "u", "item_id": "i", "timestamp": 5, "rating": 4}\n')
        assert read(path=str(path), **RATINGS)[0][["user_id", "item_id", "timestamp"]].values.tolist() == [
            ["u", "i", 5]
        ]
        assert open_source(DatasetConfig(path=str(path), **RATINGS)).describe()["types"]["rating"] == "int64"


def test_gzip_and_row_filter_keep_the_order_and_the_numbers(tmp_path):
    with gzip.open(tmp_path / "log.csv.gz", "wt") as file:
        file.write("user_id,item_id,timestamp,kind,price\n")
        for index in range(10):
            file.write(f"{index},i,{1_000_000_000 + index},{'click' if index % 2 else 'view'},{index}.5\n")
    rows, _, _ = read(
        path=str(tmp_path / "log.csv.gz"),
        feedback="implicit",
        row_filter="kind == 'click' and (price > 3 or price < 2)",
    )
    assert rows["user_id"].tolist() == ["1", "3", "5", "7", "9"]
    assert rows["row"].tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "a.b == 1",
        "f(a) == 1",
        "a == [x for x in b]",
        "a",
        "a ==",
        "a in b",
        "lambda: 1",
        "a[0] == 1",
    ],
)
def test_filters_are_no_programs(text):
    with pytest.raises(ConfigError, match="row_filter"):
        parse_row_filter(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_as_filter_parses_or_is_refused(text):
    try:
        parse_row_filter(text)
    except ConfigError:
        return


def test_movielens(tmp_path):
    old = tmp_path / "ml-100k"
    old.mkdir()
    (old / "u.data").write_text("1\t10\t5\t881250949\n2\t11\t3\t881250950\n")
    flags = "|".join("0" * 19)
    (old / "u.item").write_bytes(f"10|Café (1994)|01-Jan-1994||http://x|{flags}\n".encode("latin1"))
    assert read(path=str(old), format="movielens_100k")[0]["label"].tolist() == [1, 0]
    assert items_of(path=str(old), format="movielens_100k") == {"10": "Café (1994)"}
    million = tmp_path / "ml-1m"
    million.mkdir()
    (million / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (million / "movies.dat").write_bytes("661::Amélie: 2 (2001)::Comedy\n1193::A::B\n".encode("latin1"))
    rows, bad, _ = read(path=str(million), format="movielens_1m")
    assert rows[["user_id", "item_id", "timestamp"]].values.tolist() == [
        ["1", "1193", 978300760],
        ["1", "661", 978302109],
    ]
    assert not bad
    assert items_of(path=str(million), format="movielens_1m")["661"] == "Amélie: 2 (2001)"
    new = tmp_path / "ml-32m"
    new.mkdir()
    (new / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,17,4.0,944249077\n")
    (new / "movies.csv").write_text('movieId,title,genres\n17,"Sense, and (1995)",Drama\n')
    assert read(path=str(new), format="movielens_32m")[0]["label"].tolist() == [1]
    assert items_of(path=str(new), format="movielens_32m", item_text="{title} [{genres}]") == {
        "17": "Sense, and (1995) [Drama]"
    }


def test_recbole(tmp_path):
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\ta\t4\t881250949\n"
    )
    (tmp_path / "x.item").write_text('item_id:token\tmovie_title:token_seq\na\tThe "Odd" One\n')
    assert read(path=str(tmp_path), format="recbole")[0]["timestamp"].tolist() == [881250949]
    assert items_of(path=str(tmp_path), format="recbole") == {"a": 'The "Odd" One'}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_amazon(tmp_path):
    for year in ("2018", "2023", "2018csv", "2023csv"):
        (tmp_path / year).mkdir()
    review = {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1483228800, "reviewText": "x"}
    write_jsonl(tmp_path / "2018" / "Books_5.json.gz", [review])
    write_jsonl(tmp_path / "2018" / "meta_Books.json.gz", [{"asin": "B1", "title": "T", "also_buy": []}])
    rows, _, _ = read(path=str(tmp_path / "2018"), format="amazon_2018", like_threshold=5)
    assert rows[["user_id", "item_id", "label"]].values.tolist() == [["A1", "B1", 1]]
    assert items_of(path=str(tmp_path / "2018"), format="amazon_2018") == {"B1": "T"}
    (tmp_path / "2018csv" / "Books.csv").write_text("B1,A1,4.0,1483228800\n")
    rows, _, _ = read(path=str(tmp_path / "2018csv"), format="amazon_2018", like_threshold=5)
    assert rows[["user_id", "item_id", "label"]].values.tolist() == [["A1", "B1", 0]]
    review = {"user_id": "A1", "parent_asin": "B1", "asin": "B0", "rating": 5.0, "timestamp": 1483228800123}
    write_jsonl(tmp_path / "2023" / "Books.jsonl.gz", [review])
    write_jsonl(tmp_path / "2023" / "meta_Books.jsonl.gz", [{"parent_asin": "B1", "title": "T", "price": None}])
    rows, _, _ = read(path=str(tmp_path / "2023"), format="amazon_2023")
    assert rows[["item_id", "timestamp"]].values.tolist() == [["B1", 1483228800]]
    assert items_of(path=str(tmp_path / "2023"), format="amazon_2023") == {"B1": "T"}
    (tmp_path / "2023csv" / "Books.csv").write_text("user_id,parent_asin,rating,timestamp\nA1,B1,5.0,1483228800123\n")
    assert len(read(path=str(tmp_path / "2023csv"), format="amazon_2023")[0]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere.csv"}, "no file or folder"),
        ({"path": "{folder}/*.tsv"}, "holds no files"),
        ({"columns": {"rating": "ratign"}}, r"no column 'ratign'.*did you mean 'rating'\?.*dataset\.columns\.rating"),
        ({"row_filter": "kind == 'click'"}, r"no column 'kind'.*dataset\.row_filter"),
        ({"items_path": "{folder}/items.csv", "item_text": "{title} {genre}"}, "no column 'genre'"),
        ({"items_path": "{folder}/items.csv", "item_text": "{title"}, "does not parse"),
        ({"path": "{folder}/broken.parquet"}, "Parquet"),
        ({"format": "movielens_1m", "path": "{folder}"}, r"ratings\.dat"),
        ({"asset": "movielens-1b", "path": None}, "not a known dataset"),
    ],
)
def test_mistakes_are_named_before_work(tmp_path, change, message):
    write_csv(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,a,1000000000,5\n")
    write_csv(tmp_path / "items.csv", "item_id,title\na,A\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    dataset = {"path": "{folder}/log.csv", **RATINGS, **change}
    filled = {k: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for k, v in dataset.items()}
    with pytest.raises(CollmError, match=message) as caught:
        read(**filled)
    assert caught.value.exit_code == 2


def test_titles_are_cleaned_by_rule(tmp_path):
    text = 'item_id,title\na,"  Two\n lines\t"\nb,\nc,"\u202eevil\u200b"\na,again\n'
    write_csv(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,a,1000000000,5\n")
    items = items_of(path=str(tmp_path / "log.csv"), items_path=write_csv(tmp_path / "items.csv", text), **RATINGS)
    assert items == {"a": "Two lines", "b": "b", "c": "evil"}


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_cleaned_text_is_one_clean_line(text):
    clean = clean_text(text)
    assert clean == clean.strip()
    assert not any(ord(character) < 32 for character in clean)
    assert clean_text(clean) == clean


def test_guessing_needs_no_numbers():
    assert guess_unit(pd.Series([float("nan")]).to_numpy()) == "s"
