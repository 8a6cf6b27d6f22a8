"""Whether 17.0 is 17: decided once for a column of a source."""

from __future__ import annotations

import pyarrow as pa
import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.forgotten_users import load_forgotten
from collm_dist.data.ingest.id_forms import (
    FRACTION,
    TEXT,
    IdIndex,
    check_extension,
    check_forms,
    drop_fractions,
    find_whole_columns,
    match_forms,
    note_forms,
    unify_items,
    warn_of_forms,
)
from collm_dist.data.ingest.input_facts import InputFacts
from collm_dist.data.ingest.input_preview import preview_rows
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import DataError
from tests.unit.test_lost_lines import CLICKS, write


def forms_of(*batches):
    forms = {}
    for ids in batches:
        note_forms(pa.chunked_array([pa.array(ids, pa.string())]), forms)
    return forms


@pytest.mark.parametrize(
    ("batches", "forms"),
    [
        ([["1", "20"], ["0", "-3"]], {}),
        ([["1", "2"], ["3.0", "1.00"]], {FRACTION: "3.0"}),
        ([["1.0", "2.5"]], {FRACTION: "1.0", TEXT: "2.5"}),
        ([["x"], ["y", "1.0"]], {TEXT: "x", FRACTION: "1.0"}),
        ([["007"]], {TEXT: "007"}),  # a number is not written so
        ([["1e5", "v1.0"]], {TEXT: "1e5"}),
        ([["-0.0", "12345678901234567890.0"]], {FRACTION: "-0.0"}),
        ([[""]], {TEXT: ""}),
        ([[]], {}),
    ],
)
def test_forms(batches, forms):
    assert forms_of(*batches) == forms
    sliced = pa.array(["x", *[i for batch in batches for i in batch]])[1:]
    found = {}
    note_forms(sliced, found)
    assert found == forms


def test_the_decision_is_for_a_whole_column():
    assert find_whole_columns({"user_id": {FRACTION: "1.0"}, "item_id": {FRACTION: "1.0", TEXT: "a"}}, {}) == {
        "user_id"
    }
    assert find_whole_columns({"user_id": {FRACTION: "1.0"}}, {"user_id": ["1", "2"]}) == {"user_id"}
    assert not find_whole_columns({"user_id": {FRACTION: "1.0"}}, {"user_id": ["1.0", "x"]})
    assert not find_whole_columns({"user_id": {}, "item_id": {TEXT: "a"}}, {})
    (warning,) = warn_of_forms({"user_id": {FRACTION: "1.0", TEXT: "beta"}, "item_id": {FRACTION: "1.0"}})
    assert "user ids such as '1.0' are kept" in warning
    assert "'beta'" in warning


def test_fractions_are_dropped_from_numbers_alone():
    ids = pa.array(["17.0", "17.00", "17", "1.10", "v1.0", "007.0", "-3.0", None, ".0"])
    assert drop_fractions(ids).to_pylist() == ["17", "17", "17", "1.10", "v1.0", "007.0", "-3", None, ".0"]


def test_a_file_with_both_forms_of_a_number_is_refused():
    day1, day2 = pa.array(["1", "2", "1"]), pa.array(["1.0", "2.0"])
    check_forms(["a.csv", "b.csv"], [day1, day2], "user_id")
    with pytest.raises(DataError, match=r"a\.csv: there are user ids '1' and '1\.0', which may be one user or two"):
        check_forms(["a.csv", "b.csv", "a.csv"], [day1, day2, day2], "user_id")
    with pytest.raises(DataError, match=r"item ids '1\.0' and '1\.00'"):
        check_forms(["a.csv"], [pa.array(["1.0", "2", "1.00"])], "item_id")


def test_an_extended_run_keeps_its_users():
    forms = {FRACTION: "1.0", TEXT: "guest"}
    check_extension(forms, pa.chunked_array([["1.0", "guest"]]), ["1.0"], "user_id")
    check_extension({FRACTION: "1.0"}, pa.chunked_array([["1"]]), ["1"], "user_id")
    with pytest.raises(DataError, match=r"extend_from: the user '2\.0' of the log is probably '2' .*'guest'"):
        check_extension(forms, pa.chunked_array([["1.0"], ["2.0", "guest"]]), ["1", "1.0", "2"], "user_id")


def test_items_without_a_title_bear_their_id():
    items = pa.table({"item_id": ["1.0", "2.0", "2"], "title": ["1.0", "B", "C"], "text": ["1.0", "b", "c"]})
    assert unify_items(items).to_pylist() == [
        {"item_id": "1", "title": "1", "text": "1"},
        {"item_id": "2", "title": "B", "text": "b"},
    ]


@pytest.mark.parametrize(
    ("log", "items", "is_whole"),
    [
        ({FRACTION: "1.0"}, ["1", "2"], True),
        ({}, ["1.0", "2.0"], True),
        ({}, ["1.0", "abc"], True),  # an item without rows decides nothing
        ({}, ["1.0", "1", "abc"], False),
        ({}, ["1.0", "1"], True),
        ({TEXT: "abc"}, ["1.0", "2.0"], False),
        ({}, ["1", "2"], False),  # nothing to decide
    ],
)
def test_item_files_follow_the_log(log, items, is_whole):
    facts = InputFacts(forms={"user_id": {}, "item_id": dict(log)})
    table = pa.table({"item_id": items, "title": items, "text": items})
    assert ("item_id" in facts.settle_ids(table, {})) == is_whole


def test_ids_from_outside_the_log():
    numbers, texts = IdIndex(["17", "4", "\x1aforgotten-2"]), IdIndex(["17", "v1", "4.0"])
    assert [numbers.find(raw) for raw in ("17", "17.0", "4.00", "5.0", "x", "1.5")] == [0, 0, 1, None, None, None]
    assert [numbers.spell(raw) for raw in ("17.000", "5.0", "\ud800.0", "1.0\n")] == ["17", "5.0", "\ud800.0", "1.0\n"]
    assert IdIndex(["100", "-3"]).find("100.00") == 0
    assert [texts.find(raw) for raw in ("17", "17.0", "4.0", "4")] == [0, None, 2, None]
    ids = pa.array(["17.0", "x"])
    assert match_forms(ids, pa.array(["17", "4"])).to_pylist() == ["17", "x"]
    assert match_forms(ids, pa.array(["17", "v4"])).to_pylist() == ["17.0", "x"]


def test_a_list_of_forgotten_users_stands_for_both_forms(tmp_path):
    assert load_forgotten(write(tmp_path / "a.csv", "user_id", "17.0", "17", "v1.0")).to_pylist() == ["17", "v1.0"]


def test_the_preview_decides_as_the_data_step_does(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    write(log / "day1.csv", "user_id,item_id,timestamp", "1,a,1700000000", "2,b,1700000001")
    write(log / "day2.csv", "user_id,item_id,timestamp", "1.0,a,1700000002", "2.0,b,1700000003")
    text = "\n".join(preview_rows(open_source(DatasetConfig.model_validate({"path": str(log), **CLICKS}))))
    assert "users: 2," in text
    assert "all user ids are whole numbers, so an id such as '1.0' is read as '1'" in text
    write(log / "day3.csv", "user_id,item_id,timestamp", "guest,a,1700000004")
    text = "\n".join(preview_rows(open_source(DatasetConfig.model_validate({"path": str(log), **CLICKS}))))
    assert "users: 5," in text
    assert "WARNING: user ids such as '1.0' are kept as they are written" in text
