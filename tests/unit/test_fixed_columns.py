"""Columns of fixed formats that the settings name: taken over where the files have them."""

from __future__ import annotations

import json

import pytest

from collm_dist.errors import DataError
from tests.unit.test_lost_lines import write
from tests.unit.test_readers import RATINGS, items_of, read

REVIEW = {"reviewerID": "A", "asin": "B", "overall": 5.0, "unixReviewTime": 1483228800}


def test_recbole_with_other_names(tmp_path):
    write(tmp_path / "x.inter", "visitor_id:token\titem_id:token\tstars:float\ttimestamp:float", "1\t5\t4\t7")
    write(tmp_path / "x.item", "item_id:token\ttitle:token\tname:token_seq", "5\tT\tN")
    settings = {"path": str(tmp_path), "format": "recbole"}
    with pytest.raises(DataError, match=r"no column 'user_id'.*Set dataset\.columns\.user_id"):
        read(**settings)
    columns = {"user_id": "visitor_id", "rating": "stars"}
    rows, _, _ = read(columns=columns, **settings)
    assert rows[["user_id", "label"]].values.tolist() == [["1", 1]]
    assert items_of(columns=columns, item_columns={"title": "name"}, item_text="{title}, {name}", **settings) == {
        "5": "N, N"
    }
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\trating:float", "1\t5\t4")
    assert len(read(columns={"timestamp": None}, **settings)[0]) == 1


def test_amazon_with_more_columns(tmp_path):
    rows = [REVIEW | {"reviewerID": f"A{n}", "verified": n % 2 == 0} for n in range(4)]
    write(tmp_path / "Books_5.json", *map(json.dumps, [*rows, REVIEW]))
    write(tmp_path / "meta_Books.json", json.dumps({"asin": "B", "title": "T", "brand": "Own", "also": [1, "x"]}))
    settings = {"path": str(tmp_path), "format": "amazon_2018", **RATINGS}
    assert read(row_filter="verified == true", **settings)[0]["user_id"].tolist() == ["A0", "A2"]
    assert items_of(item_text="{title} by {brand}", **settings) == {"B": "T by Own"}
    with pytest.raises(DataError, match="no column 'colour'"):
        items_of(item_text="{title} by {colour}", **settings)


def test_fields_that_a_whole_block_of_json_lacks_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("collm_dist.data.ingest.text_blocks.BLOCK_BYTES", 300)
    lines = [
        {"user_id": f"u{n}", "item_id": "i", "timestamp": 7, **({"kind": "a"} if n < 3 else {})} for n in range(30)
    ]
    path = write(tmp_path / "log.jsonl", *map(json.dumps, lines))
    rows, bad, _ = read(path=path, feedback="implicit", row_filter="kind == 'a'")
    assert (rows["user_id"].tolist(), bad) == (["u0", "u1", "u2"], {})


def test_movielens_in_either_encoding(tmp_path):
    write(tmp_path / "ratings.dat", "1::661::5::978300760")
    settings = {"path": str(tmp_path), "format": "movielens_1m"}
    for encoding in ("utf-8", "latin1"):
        (tmp_path / "movies.dat").write_bytes("661::Am\u00e9lie (2001)::Comedy\n".encode(encoding))
        assert items_of(item_text="{title} ({genres})", **settings) == {"661": "Am\u00e9lie (2001) (Comedy)"}


def test_a_name_that_the_files_lack_is_refused_with_the_nearest(tmp_path):
    write(tmp_path / "x.inter", "user_id:token\tvisitor_id:token\titem_id:token\trating:float\ttimestamp:float",
          "1\t2\t5\t4\t7")  # fmt: skip
    write(tmp_path / "x.item", "item_id:token\tmovie_title:token_seq\tname:token_seq", "5\tT\tN")
    settings = {"path": str(tmp_path), "format": "recbole"}
    for columns, message in (
        (
            {"user_id": "visiter_id"},
            r"x\.inter: .*'visiter_id'.*did you mean 'visitor_id'\?.*dataset\.columns\.user_id",
        ),
        ({"timestamp": "time"}, r"no column 'time' \(has user_id, .*dataset\.columns\.timestamp"),
        ({"rating": "ratng"}, r"did you mean 'rating'\? Set dataset\.columns\.rating"),
    ):
        with pytest.raises(DataError, match=message) as error:
            read(columns=columns, **settings)
        assert error.value.exit_code == 2
    for key, name in (("title", "nam"), ("item_id", "item_idd")):
        with pytest.raises(DataError, match=rf"x\.item: .*'{name}'.*did you mean.*dataset\.item_columns\.{key}"):
            read(item_columns={key: name}, **settings)
    rows, _, _ = read(feedback="implicit", columns={"rating": "ratng", "label": "x"}, **settings)  # not read
    assert len(rows) == 1


def test_names_of_other_formats_in_shipped_settings_stop_no_fixed_format(tmp_path):
    write(tmp_path / "Books_5.json", json.dumps(REVIEW))
    write(tmp_path / "meta_Books.json", json.dumps({"asin": "B", "title": "T"}))
    settings = {"path": str(tmp_path), "format": "amazon_2018"}
    assert len(read(columns={"rating": "rating", "user_id": "user_id"}, **settings)[0]) == 1
    for columns in ({"rating": "overal"}, {"user_id": "reviewer_id"}):
        with pytest.raises(DataError, match=r"did you mean '(overall|reviewerID)'"):
            read(columns=columns, **settings)


def test_fixed_formats_without_a_header_have_the_names_of_the_format(tmp_path):
    write(tmp_path / "ratings.dat", "1::661::5::978300760")
    write(tmp_path / "movies.dat", "661::T::Comedy")
    with pytest.raises(DataError, match=r"'item' \(has user_id, item_id, .*did you mean 'item_id'"):
        read(path=str(tmp_path), format="movielens_1m", columns={"item_id": "item"})
