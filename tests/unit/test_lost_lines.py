"""Lines of text files: each becomes a row, or is counted with its true number."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import DataError
from tests.unit.test_readers import RATINGS, items_of, read

CLICKS = {"feedback": "implicit"}
JOINED = "line joined to another row by a quote that is not closed"
WIDTH = "wrong number of columns"


def write(path, *lines, end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode())
    return str(path)


def test_tabs_separate_cells_without_quotes(tmp_path):
    lines = [f"u{n}\ti{n}\t{10**9 + n}\t{query}" for n, query in enumerate(["a", '"open', "b", 'c"', '12" vinyl'])]
    path = write(tmp_path / "log.tsv", "user_id\titem_id\ttimestamp\tquery", *lines)
    rows, bad, _ = read(path=path, **CLICKS)
    assert (rows["user_id"].tolist(), bad) == (["u0", "u1", "u2", "u3", "u4"], {})
    titles = write(
        tmp_path / "items.tsv", "item_id\ttitle", 'i0\t"Best day," says x', 'i1\t"Quiet', "i2\tThird", 'i3\tD"'
    )
    texts = items_of(path=path, items_path=titles, **CLICKS)
    assert texts == {"i0": '"Best day," says x', "i1": '"Quiet', "i2": "Third", "i3": 'D"'}


def test_tabs_with_a_quoted_header_have_quoted_cells(tmp_path):
    path = write(tmp_path / "log.tsv", '"user_id"\t"item_id"\t"timestamp"', '"u\t1"\t"i"\t"1000000000"', end="\r\n")
    assert read(path=path, **CLICKS)[0]["user_id"].tolist() == []  # a tab in an id is a control character
    path = write(tmp_path / "log.tsv", '"user_id"\t"item_id"\t"timestamp"', '"u1"\t"i"\t"1000000000"')
    assert read(path=path, **CLICKS)[0]["user_id"].tolist() == ["u1"]


def test_rows_that_a_quote_swallows_are_counted(tmp_path):
    lines = [f"u{n},i{n},{10**9 + n},{title}" for n, title in enumerate(["a", '"open', "b", "c", '"d"', "e"])]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", *lines)
    rows, bad, examples = read(path=path, **CLICKS)
    assert rows["user_id"].tolist() == ["u0", "u1", "u5"]
    assert bad == {JOINED: 3}
    assert "log.csv:3: " in examples[0]


def test_lines_inside_quotes_that_look_unlike_rows_are_counted_too(tmp_path):
    """The quote is closed by the opening quote of a later row; lines in between have commas, or other quotes."""
    lines = ["u0,i0,7,a", 'u1,i1,8,"open', 'u2,i2,9,""', "u3,i3,10,b, c", "", 'u4,i4,11,"d"', "u5,i5,12,e"]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", *lines)
    rows, bad, examples = read(path=path, **CLICKS)
    assert (rows["user_id"].tolist(), bad) == (["u0", "u1", "u5"], {JOINED: 4})
    assert f"log.csv:3: {JOINED} (4 of the lines from here on)" in examples[0]


def test_prose_of_several_lines_is_plausible(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,i,7")
    lines = [f'i{n},"First, a line\nHowever, this\nis, or was, one\n" ' for n in range(9)]
    source = open_source(DatasetConfig.model_validate(
        {"path": path, "items_path": write(tmp_path / "items.csv", "item_id,title", *lines), **CLICKS}))  # fmt: skip
    assert not source.read_items().bad_rows.counts


def test_a_row_with_cells_of_another_row_is_lost(tmp_path):
    lines = ["u0,a,i0,7", 'u1,"open,i1,8', 'u2,"b",i2,9', "u3,c,i3,10"]
    path = write(tmp_path / "log.csv", "user_id,title,item_id,timestamp", *lines)
    rows, bad, examples = read(path=path, **CLICKS)
    assert (rows["user_id"].tolist(), rows["item_id"].tolist(), bad) == (["u0", "u3"], ["i0", "i3"], {JOINED: 2})
    assert "log.csv:3: " in examples[0]


def test_a_closing_quote_far_away_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("collm_dist.data.ingest.text_rows.MAX_CELL_LINES", 5)
    for count, lost in ((5, {}), (6, {JOINED: 6})):
        text = "\n".join(f"line {n}" for n in range(count + 1))
        path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", f'u1,i1,8,"{text}"', "u2,i2,9,")
        rows, bad, _ = read(path=path, **CLICKS)
        assert (rows["user_id"].tolist(), bad) == (["u1", "u2"], lost)


def test_most_lines_of_a_cell_that_look_like_rows_count_all(tmp_path):
    lines = ['u1,i1,8,"a', "u2,i2,9,b", "x", 'u3,i3,10,c"', "u4,i4,11,d"]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", *lines)
    assert read(path=path, **CLICKS)[1] == {JOINED: 3}
    lines[1:2] = ["y", "z"]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", *lines)
    assert read(path=path, **CLICKS)[1] == {JOINED: 1}


def test_texts_of_several_lines_are_no_lost_rows(tmp_path):
    review = '"First, a ""good"" line\n\nand another\n"'
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,review,rating", f"u0,i0,7,{review},x",
                 'u1,i1,8,"one",5', f"u2,i2,9,{review},4", "u3,i3,10,,5,6", "", "u4,i4,11,plain,4")  # fmt: skip
    rows, bad, examples = read(path=path, **RATINGS)
    assert rows["user_id"].tolist() == ["u1", "u2", "u4"]
    assert rows["row"].tolist() == [1, 2, 3]
    assert bad == {"rating is not a number": 1, WIDTH: 1}
    assert [re.search(r":(\d+): ", example).group(1) for example in examples] == ["11", "2"]
    assert "1 rows have 6 columns, the header 5" in examples[0]
    assert "('x')" in examples[1]


def test_a_quote_may_close_in_a_later_block(tmp_path, monkeypatch):
    monkeypatch.setattr("collm_dist.data.ingest.text_blocks.BLOCK_BYTES", 40)
    lines = [f'u{n},i{n},{10**9 + n},"a\n{"b" * n}, ""c"""' for n in range(30)]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", *lines, end="\r\n")
    rows, bad, _ = read(path=path, **CLICKS)
    assert (rows["user_id"].tolist(), rows["row"].tolist(), bad) == ([f"u{n}" for n in range(30)], list(range(30)), {})
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,title", *lines, '1,"b,7,7', "1,b,7,7")
    assert read(path=path, **CLICKS)[1] == {WIDTH: 2}


def test_rows_of_another_width_than_the_header(tmp_path):
    lines = [f"u{n},i{n},{10**9 + n},3," for n in range(12)]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating", *lines)
    with pytest.raises(
        DataError, match=r"(?s)12 x wrong number.*log\.csv:2.*12 rows have 5 columns, the header 4"
    ) as error:
        open_source(DatasetConfig.model_validate({"path": path, **RATINGS}))
    assert "no rows" not in str(error.value)


def test_cells_of_the_header_that_nobody_reads(tmp_path):
    path = write(tmp_path / "log.csv", ",user_id,item_id,timestamp,x,x,,rating", "0,u,i,7,1,2,3,5")
    assert read(path=path, **RATINGS)[0]["user_id"].tolist() == ["u"]
    for name in ("x", ""):
        with pytest.raises(DataError, match=r"several columns are named 'x'|no column ''|named ''"):
            read(path=path, columns={"rating": "rating", "user_id": name})
    pq.write_table(pa.table([["u"], ["i"], [7], [1], [2]], ["user_id", "item_id", "timestamp", "x", "x"]),
                   tmp_path / "log.parquet")  # fmt: skip
    assert len(read(path=str(tmp_path / "log.parquet"), **CLICKS)[0]) == 1


@pytest.mark.parametrize("text", ["user_id,item_id,timestamp,rating", "user_id,item_id,timestamp,rating\n\n\n"])
def test_a_header_alone_is_refused_in_words(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=r"log\.csv: the file has no rows .* only a header"):
        read(path=str(tmp_path / "log.csv"), **RATINGS)


def test_places_in_parquet_count_from_the_start_of_the_file(tmp_path):
    table = pa.table({"user_id": [*["u"] * 40, None], "item_id": ["i"] * 41, "timestamp": [10**9] * 41})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=1)
    _, bad, examples = read(path=str(tmp_path / "log.parquet"), **CLICKS)
    assert bad == {"missing user_id": 1}
    assert "log.parquet:41: " in examples[0]


REVIEW = {"reviewerID": "A", "asin": "B", "overall": 5.0, "unixReviewTime": 1483228800}


def test_one_bad_line_of_json_is_one_bad_row(tmp_path):
    rows = [json.dumps(REVIEW | {"reviewerID": f"A{n}"}) for n in range(4)]
    rows[1:1] = ['{"reviewerID":"A1","asi', "", "null", "[1]"]
    write(tmp_path / "Books_5.json", *rows)
    found, bad, examples = read(path=str(tmp_path), format="amazon_2018")
    assert found["user_id"].tolist() == ["A0", "A1", "A2", "A3"]
    assert bad == {"line is not a JSON object": 3}
    assert [re.search(r"json:(\d+): ", example).group(1) for example in examples] == ["2", "4", "5"]


@pytest.mark.parametrize("change", [{"unixReviewTime": "1483228800"}, {"unixReviewTime": 1483228800.0},
                                    {"overall": "5"}, {"reviewerID": 7}])  # fmt: skip
def test_json_values_of_another_type(tmp_path, change):
    write(tmp_path / "Books_5.json", json.dumps(REVIEW), json.dumps(REVIEW | change))
    rows, bad, _ = read(path=str(tmp_path), format="amazon_2018")
    assert (rows["timestamp"].tolist(), rows["label"].tolist(), bad) == ([1483228800] * 2, [1, 1], {})
    assert rows["user_id"].tolist() == ["A", str(change.get("reviewerID", "A"))]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"PK\x03\x04rest", "a zip archive"), (b"\xfd7zXZ\x00rest", "an xz archive"), (b"PAR1rest", "a Parquet file"),
     (b"7z\xbc\xaf'", "a 7z archive"), (b"Rar!rest", "a rar archive"), (b"\x89HDF", "an HDF5 file"),
     (b"\x80\x04\x95rest", "a Python pickle"), (b"\xd0\xcf\x11\xe0", "an Excel file")],
)  # fmt: skip
def test_archives_are_named(tmp_path, data, message):
    (tmp_path / "log.csv").write_bytes(data)
    with pytest.raises(DataError, match=rf"log\.csv: .*{message}"):
        read(path=str(tmp_path / "log.csv"), **RATINGS)


def test_a_packed_tar_archive_is_named(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating", "u,i,7,5")
    with tarfile.open(tmp_path / "log.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "log.csv", "log.csv")
    with pytest.raises(DataError, match=r"log\.tar\.gz: the file is a tar archive"):
        read(path=str(tmp_path / "log.tar.gz"), **RATINGS)


@pytest.mark.parametrize("change", [{"path": "log.csv"}, {"path": "good.csv", "items_path": "log.csv"}])
@pytest.mark.parametrize("lines", [["a,b,c", "1,2"], ["user_id,item_id,timestamp", "1,2"], ["PK\x03\x04"]])
def test_a_refused_file_is_closed(tmp_path, change, lines):
    """A file that is still open when the process ends could abort it."""
    write(tmp_path / "log.csv", *lines)
    write(tmp_path / "good.csv", "user_id,item_id,timestamp", "u,i,7")
    with pytest.raises(DataError):
        read(**{key: str(tmp_path / name) for key, name in change.items()}, **CLICKS)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_packed_files_need_no_suffix(tmp_path, pack):
    (tmp_path / "log.csv").write_bytes(pack(b"user_id,item_id,timestamp,rating\nu,i,7,5\n"))
    assert len(read(path=str(tmp_path / "log.csv"), **RATINGS)[0]) == 1
    (tmp_path / "log.csv.gz").write_bytes(bz2.compress(b"user_id,item_id,timestamp,rating\nu,i,7,5\n"))
    with pytest.raises(DataError, match="is not gzip, but bz2"):
        read(path=str(tmp_path / "log.csv.gz"), **RATINGS)


def test_python_dictionaries_in_lines_are_read_and_nothing_is_run(tmp_path):
    rows = [
        "{'user_id': u'A\\'s', 'item_id': \"B\", 'timestamp': 7, 'x': None}",
        "{'user_id': __import__('os'), 'item_id': 1}",
        "{'user_id': {1, 2}, 'item_id': b'x'}",
        "{'user_id': 'A'",
        json.dumps({"user_id": "C", "item_id": "D", "timestamp": 8}),
    ]
    found, bad, examples = read(path=write(tmp_path / "log.json", *rows), **CLICKS)
    assert found[["user_id", "item_id", "timestamp"]].values.tolist() == [["A's", "B", 7], ["C", "D", 8]]
    assert bad == {"line is not a JSON object": 3}
    assert [re.search(r"json:(\d+): ", example).group(1) for example in examples] == ["2", "3", "4"]


def test_labels_may_be_words(tmp_path):
    lines = [f"u,i{n},{10**9 + n},{label}" for n, label in enumerate(["true", "False", " TRUE", "1", "0.0", "yes", ""])]
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,label", *lines)
    rows, bad, _ = read(path=path, columns={"label": "label"}, max_bad_row_share=1)
    assert (rows["label"].tolist(), bad) == ([1, 0, 1, 1, 0], {"label is neither 0 nor 1": 2})
