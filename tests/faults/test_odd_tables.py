"""Tables as programs and people write them: read as they are meant, warned of, or refused with the remedy."""

import bz2
import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.input_checks import check_reads
from collm_dist.data.ingest.input_preview import preview_rows
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import DataError
from tests.unit.test_readers import RATINGS, read

MARK = b"\xef\xbb\xbf"
HEADER = b"user_id,item_id,timestamp,rating\n"
ROWS = b"u1,a,1000000000,5\nu2,b,1000000001,1\n"
ITEMS = "item_id,title\na,One\nb,Two\n"


def write(folder, content, name="log.csv"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path)


def preview(folder, log, items=ITEMS, **settings):
    paths = {"path": write(folder, log), "items_path": write(folder, items.encode(), "items.csv")}
    return "\n".join(preview_rows(open_source(DatasetConfig.model_validate({**paths, **RATINGS, **settings}))))


@pytest.mark.parametrize(
    "content",
    [
        MARK * 2 + HEADER + ROWS,
        MARK + HEADER + ROWS[:18] + MARK + ROWS[18:],
        HEADER + MARK + ROWS.replace(b"\n", b"\r"),
    ],
    ids=["twice", "in the middle", "after the header"],
)
def test_byte_order_marks_of_files_put_together(tmp_path, content):
    rows, bad, _ = read(path=write(tmp_path, content), **RATINGS)
    assert (rows["user_id"].tolist(), bad) == (["u1", "u2"], {})


def test_packed_files_put_together_are_read_whole(tmp_path):
    for name, pack in (("log.csv.gz", gzip.compress), ("log.csv.bz2", bz2.compress),
                       ("log.csv.zst", lambda data: pa.compress(data, codec="zstd", asbytes=True))):  # fmt: skip
        whole = pack(HEADER + ROWS) + pack(ROWS * 1000)
        assert len(read(path=write(tmp_path, whole, name), **RATINGS)[0]) == 2002
        with pytest.raises(DataError, match=rf"{name}: cannot be read as text: Truncated"):
            read(path=write(tmp_path, whole[:-9], name), **RATINGS)
        with pytest.raises(DataError, match=rf"{name}: cannot be read as text: the file has no bytes; remove it"):
            read(path=write(tmp_path, b"", name), **RATINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((HEADER + ROWS).decode().encode("utf-16-le"), "is probably UTF-16 text.*dataset.encoding=utf-16-le"),
        ((HEADER + ROWS).decode().encode("utf-16-be"), "is probably UTF-16 text.*dataset.encoding=utf-16-be"),
        ((HEADER + ROWS).replace(b",", b" "), r"has user_id item_id timestamp rating\); .*set the delimiter"),
        (HEADER.title() + ROWS, r"no column 'user_id'.*did you mean 'User_Id'\?"),
        (HEADER.replace(b"user_id", b"user_id\0") + ROWS, r"did you mean 'user_id\\x00'\?"),
        (b"sep=;\n" + (HEADER + ROWS).replace(b",", b";"), "check that the first line names the columns"),
        (HEADER[:-1] + b",\n" + ROWS, "2 rows have 4 columns, the header 5"),
    ],
)
def test_a_table_of_another_form_is_refused_with_the_remedy(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"(?s)log\.csv: .*{message}"):
        read(path=write(tmp_path, content), **RATINGS)


@pytest.mark.parametrize("number", ["1.2e9", "9.78055E+12", "1e+18", "-1.5E7"])
def test_ids_in_scientific_notation_are_counted(tmp_path, number):
    """Several ids can have the same form there."""
    log = HEADER + ROWS + f"{number},a,1000000000,5\n1e5,a,1000000000,5\nu3,{number},1000000000,5\n".encode()
    rows, bad, examples = read(path=write(tmp_path, log), **RATINGS)
    assert rows["user_id"].tolist() == ["u1", "u2", "1e5"]
    assert bad == {"user_id is in scientific notation": 1, "item_id is in scientific notation": 1}
    assert examples[0].endswith(f"log.csv:4: user_id is in scientific notation ('{number}')")


def test_long_ids_in_a_column_of_floats_are_counted(tmp_path):
    log = {"user_id": [2.0**60, 17.0], "item_id": ["a", "b"], "timestamp": [10**9] * 2, "rating": [5.0, 1.0]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    rows, bad, _ = read(path=str(tmp_path / "log.parquet"), **RATINGS)
    assert (rows["user_id"].tolist(), bad) == (["17"], {"user_id is in scientific notation": 1})


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        ("timestamp is not a time", "set dataset.time_format"),
        ("rating is not a number", "numbers are written as 4.5, without other marks"),
        ("label is neither 0 nor 1", "labels are 0 and 1, or true and false"),
        ("user_id is in scientific notation", "write them in full"),
    ],
)
def test_unusable_values_come_with_the_remedy(cause, remedy):
    reads = [{"rows_read": 2, "usable": 1, "bad": {cause: 1}, "examples": [f"log.csv:2: {cause}"]}]
    with pytest.raises(DataError, match=rf"1 of 2 rows cannot be used \(1 x {cause}\).*fix the input .*{remedy}"):
        check_reads(DatasetConfig.model_validate({"path": "log.csv", **RATINGS}), reads, {}, 0)


@pytest.mark.parametrize(
    ("user", "warning"),
    [
        (b"caf\xe9", r"user ids such as 'caf\ufffd' have bytes that do not fit the encoding, so several users may be"),
        (b"\xe2\x80\x8bu1", r"user ids such as '\u200bu1' have invisible characters"),
        ("e\u0301".encode(), r"user ids such as 'e\u0301' are not in the normal form NFC"),
    ],
)
def test_ids_that_only_look_alike_are_warned_of(tmp_path, user, warning):
    assert f"WARNING: {warning}" in preview(tmp_path, HEADER + ROWS + user + b",a,1000000000,5\n")
    assert "WARNING" not in preview(tmp_path, HEADER + ROWS * 2 + "\u4e2d\u00e9,a,1000000000,5\n".encode())


@pytest.mark.parametrize(
    ("in_log", "in_items"), [("A", "a"), ("007", "7"), ('"""q"""', "q"), ("\u00e9", "e\u0301")], ids=ascii
)
def test_items_in_another_spelling_are_shown(tmp_path, in_log, in_items):
    log = HEADER + ROWS + f"u1,{in_log},1000000000,5\n".encode()
    shown = in_log.replace('"""', '"')
    warning = (
        f"1 of 1 items that the item file lacks are there in another spelling, as {in_items!a} instead of {shown!a}"
    )
    assert f"WARNING: {warning}; write ids alike" in preview(tmp_path, log, f"{ITEMS}{in_items},Three\n")
    other = HEADER + ROWS + b"u1,zz,1000000000,5\n"
    assert "another spelling" not in preview(tmp_path, other, f"{ITEMS}{in_items},Three\n")


def test_repairs_of_items_are_in_the_preview(tmp_path):
    path = write(tmp_path, b"item_id,title\na,Caf\xe9\nb,Two\na,Other\n", "items.csv")
    dataset = {"path": write(tmp_path, HEADER + ROWS), "items_path": path, **RATINGS}
    lines = preview_rows(open_source(DatasetConfig.model_validate(dataset)))
    assert lines[-2:] == [
        "items: 1 x rows of an item with another text",
        "items: 1 x titles with bytes that do not fit the encoding (dataset.encoding)",
    ]


@pytest.mark.parametrize("copy", ["a.csv.gz", "a.csv~", "a.csv.bak"])
def test_copies_of_a_file_do_not_count_twice(tmp_path, copy):
    write(tmp_path / "log", HEADER + ROWS, "a.csv")
    write(tmp_path / "log", HEADER + ROWS, copy)
    with pytest.raises(DataError, match=r"dataset\.path: '.*' and '.*' are probably copies of the same rows"):
        read(path=str(tmp_path / "log"), **RATINGS)
    (tmp_path / "log" / copy).rename(tmp_path / "log" / "b.csv")
    assert len(read(path=str(tmp_path / "log"), **RATINGS)[0]) == 4
    assert len(read(path=f"{tmp_path}/log/a.c*", **RATINGS)[0]) == 2


def test_a_stray_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "log", HEADER + ROWS, "a.csv")
    write(tmp_path / "log", b"# Ratings\n\nRead me\n", "notes.md")
    with pytest.raises(DataError, match=r"notes\.md: .*or leave this file out \(dataset.path may be a glob\)"):
        read(path=str(tmp_path / "log"), **RATINGS)
