"""Item texts from catalogues: HTML is decoded or left out, and counted."""

from __future__ import annotations

import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.input_checks import check_items
from collm_dist.data.ingest.item_texts import clean_text
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import DataError
from tests.unit.test_lost_lines import CLICKS, write


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("Grandma&#39;s &#x4b;ettle", "Grandma's Kettle"),
        ('<span id="title">Blue <b>kettle</b></span>', "Blue kettle"),
        ("a&amp;amp;b &lt;br/&gt;c", "a&b c"),
        ("Pan<br>12&quot;", 'Pan 12"'),
        ("x<script>alert('1 > 0')</script>y<!-- no -->", "x y"),
        ("AT&T, R&D; Q&A <3 <UserID> a < b > c <Untitled> &nosuchthing;", None),
        ("&lrm;zero&#0;&#8203;width&nbsp;", "zero\ufffd width"),
        ("<<b>b>x", "< b>x"),
    ],
)
def test_html_in_titles(raw, clean):
    assert clean_text(raw) == (raw if clean is None else clean)
    assert clean_text(clean_text(raw)) == clean_text(raw)


def test_titles_with_html_are_counted(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,a,7")
    titles = write(tmp_path / "items.csv", "item_id,title", "a,Salt &amp; Pepper", "b,<i>B</i>", "c,C < D & E")
    items = open_source(DatasetConfig.model_validate({"path": path, "items_path": titles, **CLICKS})).read_items()
    assert items.table.column("title").to_pylist() == ["Salt & Pepper", "B", "C < D & E"]
    assert items.repairs == {"titles with HTML entities or tags": 2}


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (['a,"A', "b,B, or", 'c,"C"', "d,D"], {}, r"2 of 4 item rows.*2 x line joined.*\n.*items\.csv:2: line joined"),
        (["a,A,B", "b,B"], {}, r"1 of 2 item rows.*items\.csv:2: wrong number of columns \(1 rows have 3"),
        (["a,A", ",B"], {}, r"items_path: 1 of 2 .*1 x items without an id.*\n.*items\.csv:3: items without an id"),
        (["a,A", ",B"], {"max_bad_row_share": 0.5}, None),
    ],
)
def test_lost_item_rows_are_limited(tmp_path, lines, settings, message):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp", "u,a,7")
    titles = write(tmp_path / "items.csv", "item_id,title", *lines)
    dataset = DatasetConfig.model_validate({"path": path, "items_path": titles, **CLICKS, **settings})
    items = open_source(dataset).read_items()
    assert items.rows_read == len(lines)
    if message is None:
        check_items(dataset, items)
    else:
        with pytest.raises(DataError, match=rf"(?s){message}") as error:
            check_items(dataset, items)
        assert error.value.exit_code == 2
