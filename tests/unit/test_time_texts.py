"""Times in the forms that logs have, and settings of text tables."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import DataError
from tests.unit.test_lost_lines import CLICKS, write
from tests.unit.test_readers import items_of, read

NOON = 1569931200  # 2019-10-01 12:00:00 UTC


def read_times(folder, *texts, **settings):
    lines = [f'"u{number}","i","{text}"' for number, text in enumerate(texts)]
    path = write(folder / "log.csv", "user_id,item_id,timestamp", *lines)
    rows, bad, examples = read(path=path, **CLICKS, **settings)
    return rows["timestamp"].tolist(), bad, examples


@pytest.mark.parametrize(
    "text",
    [
        "2019-10-01 12:00:00 UTC", "2019-10-01T12:00:00Z", "2019-10-01 14:00:00+02:00", "2019-10-01 14:00:00 +0200",
        "2019-10-01 12:00:00 +0000 UTC", "2019-10-01 12:00:00 GMT", "20191001120000", "201910011200",
        "2019/10/01 12:00:00", "2019.10.01 12:00", "Tue, 01 Oct 2019 12:00:00 GMT", "Tue Oct 01 12:00:00 +0000 2019",
        "01/Oct/2019:14:00:00 +0200", "1 Oct 2019 12:00", "Oct 1, 2019 12:00:00", "01-Oct-2019 12:00",
        "2019-10-01 12:00:00.123456 UTC", str(NOON), f"{NOON}000",
    ],
)  # fmt: skip
def test_forms_with_one_meaning_are_read(tmp_path, text):
    assert read_times(tmp_path, text, text)[:2] == ([NOON, NOON], {})


def test_days_in_digits(tmp_path):
    assert read_times(tmp_path, "20240101", "20240229")[0] == [1704067200, 1709164800]
    assert read_times(tmp_path, "20240101", "20240230", timestamp_unit="s")[0] == [20240101, 20240230]
    assert read_times(tmp_path, "20240101", "20240199")[0] == [20240101, 20240199]  # not all of them are dates
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,i,20240101")
    facts = open_source(DatasetConfig.model_validate({"path": path, **CLICKS})).describe()
    assert facts["timestamp_unit"] == "YYYYMMDD"
    assert facts["times in the first rows"] == "2024-01-01 00:00:00 to 2024-01-01 00:00:00 (UTC)"


def test_ambiguous_times_need_a_format(tmp_path):
    rows, bad, examples = read_times(tmp_path, "01/10/2019 12:00")
    assert (rows, bad) == ([], {"timestamp is not a time": 1})
    assert "log.csv:2: timestamp is not a time ('01/10/2019 12:00')" in examples[0]
    assert read_times(tmp_path, "01/10/2019 12:00", "x", time_format="%d/%m/%Y %H:%M")[:2] == (
        [NOON], {"timestamp is not a time": 1})  # fmt: skip


def test_the_order_stands_for_missing_times(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id", "u,a", "u,b")
    assert read(path=path, columns={"timestamp": None}, **CLICKS)[0]["row"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "delimiter", "settings"),
    [("log.csv", ";", {}), ("log.txt", "\t", {}), ("log.csv", "|", {}), ("log.tsv", ",", {}),
     ("log.csv", "~", {"delimiter": "~"}), ("log.dat", "::", {"delimiter": "::"}),
     ("log.csv", "\t", {"delimiter": "tab"})],
)  # fmt: skip
def test_delimiters_are_set_or_found_and_said(tmp_path, name, delimiter, settings):
    lines = [["user_id", "item_id", "timestamp"], ["u", "i", "7"]]
    path = write(tmp_path / name, *map(delimiter.join, lines))
    assert read(path=path, **CLICKS, **settings)[0]["user_id"].tolist() == ["u"]
    described = open_source(DatasetConfig.model_validate({"path": path, **CLICKS, **settings})).describe()
    assert described["delimiter"] == repr(delimiter)
    guesses = open_source(DatasetConfig.model_validate({"path": path, **CLICKS, **settings})).list_guesses()
    assert len(guesses) == (not settings and delimiter not in ",\t")
    titles = write(tmp_path / "items.csv", "item_id,title", "i,T; :: ~")
    assert items_of(path=path, items_path=titles, **CLICKS, **settings) == {"i": "T; :: ~"}


def test_a_delimiter_that_the_header_lacks_is_refused(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u;i;7", "u,i,7")
    message = r"log\.csv: dataset\.delimiter is ';'.*'user_id,item_id,timestamp' has 2 x ','\. Set dataset\.delimiter"
    with pytest.raises(DataError, match=message) as error:
        read(path=path, delimiter=";", **CLICKS)
    assert error.value.exit_code == 2
    (tmp_path / "log").mkdir()  # each file is checked, not only the first
    write(tmp_path / "log" / "a.csv", "user_id;item_id;timestamp", "u;i;7")
    write(tmp_path / "log" / "b.csv", "user_id,item_id,timestamp", "u,i,7")
    with pytest.raises(DataError, match=r"b\.csv: dataset\.delimiter is ';'"):
        read(path=str(tmp_path / "log"), delimiter=";", **CLICKS)
    one = write(tmp_path / "one.csv", "user_id", "u")
    with pytest.raises(DataError, match=r"has none of the usual delimiters"):
        read(path=one, delimiter="tab", **CLICKS)


def test_the_item_file_may_have_another_delimiter(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,i,7")
    titles = write(tmp_path / "items.dat", "item_id::title", "i::T, U")
    assert items_of(path=path, items_path=titles, item_delimiter="::", **CLICKS) == {"i": "T, U"}
    with pytest.raises(DataError, match=r"items\.dat: dataset\.item_delimiter is '\|'"):
        items_of(path=path, items_path=titles, item_delimiter="|", delimiter=",", **CLICKS)


def test_tables_without_a_header(tmp_path):
    path = write(tmp_path / "log.csv", "u1,i,7", "u2,i,8", "u3,i", end="\r\n")
    names = {"header": False, "names": ["user_id", "item_id", "timestamp"]}
    rows, bad, examples = read(path=path, **CLICKS, **names)
    assert (rows["user_id"].tolist(), bad) == (["u1", "u2"], {"wrong number of columns": 1})
    assert "log.csv:3:" in examples[0]
    titles = write(tmp_path / "items.csv", "i,T")
    assert items_of(path=path, items_path=titles, item_names=["item_id", "title"], **CLICKS, **names) == {"i": "T"}


@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "cp1252", "utf-8-sig"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "log.csv").write_bytes("user_id,item_id,timestamp\r\n\u00e9,i,7\r\n".encode(encoding))
    assert read(path=str(tmp_path / "log.csv"), encoding=encoding, **CLICKS)[0]["user_id"].tolist() == ["\u00e9"]
    (tmp_path / "log.csv").write_bytes("user_id,item_id,timestamp\n\u00e9,i,7\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"dataset\.encoding=utf-16"):
        read(path=str(tmp_path / "log.csv"), **CLICKS)


@pytest.mark.parametrize(
    "settings",
    [{"encoding": "latin-99"}, {"encoding": "hex"}, {"delimiter": "abc"}, {"delimiter": '"'}, {"header": False},
     {"names": ["a"]}, {"time_format": "dmy"}, {"delimiter": ";", "format": "recbole"},
     {"columns": {"timestamp": None}, "split": {"method": "calendar"}}],
)  # fmt: skip
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValidationError):
        DatasetConfig.model_validate({"path": "log.csv", **CLICKS, **settings})
