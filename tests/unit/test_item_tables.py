"""Item texts from catalogues: HTML is decoded or left out, and counted."""

from __future__ import annotations

import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.item_texts import clean_text
from collm_dist.data.ingest.source import open_source
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
    items, repairs = open_source(
        DatasetConfig.model_validate({"path": path, "items_path": titles, **CLICKS})
    ).read_items()
    assert items.column("title").to_pylist() == ["Salt & Pepper", "B", "C < D & E"]
    assert repairs == {"titles with HTML entities or tags": 2}
