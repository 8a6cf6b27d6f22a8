"""Numbers and tables of report.md."""

import pytest

from collm_dist.evaluation.report_markdown import format_number, render_markdown, render_slices


@pytest.mark.parametrize(
    ("row", "signed", "text"),
    [
        ({"auc": -0.00002, "auc_low": -0.00031, "auc_high": 0.00024}, True, "-0.0000 [-0.0003, +0.0002]"),
        ({"auc": 0.78246, "auc_low": 0.7589, "auc_high": 0.80551}, False, "0.7825 [0.7589, 0.8055]"),
        ({"auc": 0.5, "auc_low": None, "auc_high": None}, False, "0.5000"),
        ({"auc": None}, True, "-"),
    ],
)
def test_an_interval_has_as_many_decimals_as_its_value(row, signed, text):
    assert format_number(row, "auc", signed=signed) == text


def test_slices_say_how_many_users_define_the_uauc():
    def row(slice_name, rows, users, uauc):
        return {"model": "cf", "slice": slice_name, "rows": rows, "users_counted": users, "auc": 0.75, "uauc": uauc}

    head, _, line = render_slices(
        [row("all", 7331, 310, 0.68), row("cold_item", 93, 8, 0.875), row("cold_user", 9, 0, None)]
    ).splitlines()
    assert "| all (7,331 rows, UAUC of 310 users) |" in head
    assert "| cold item (93 rows, UAUC of 8 users) |" in head
    assert "| cold user (9 rows, UAUC of 0 users) |" in head
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["0.750 / 0.680", "0.750 / 0.875", "0.750 / -"]


def test_a_setting_with_a_bar_stays_within_its_cell():
    deviation = {"setting": "dataset.item_text", "ours": "{title} | {genres}", "paper": "{title}"}
    report = {"data": {"name": "a", "format": "table", "feedback": "explicit", "ties": "order", "num_users": 1,
                       "num_items": 1, "splits": {}, "evaluated": {}}, "warnings": [], "notes": [], "rows": [],
              "recipe": "ML-1M", "deviations": [deviation], "plots": []}  # fmt: skip
    assert r"| dataset.item_text | {title} \| {genres} | {title} |" in render_markdown(report)
