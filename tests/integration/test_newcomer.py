"""A new user's first two days: their own CSV file and the commands of README, verbatim."""

import json
import re

import pandas as pd
import pytest

from tests.doc_blocks import ROOT, read_blocks
from tests.integration.docs_folder import append_ratings, prepare_folder, run_block

FIRST_ROWS, NEW_ROWS = 1000, 100
RANKED_LINE = re.compile(r"(\d+) (B\d{3}) ([+-]\d+\.\d+) (.+)")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_a_csv_to_a_ranked_list_and_the_next_night(tiny_backbone_dir, tmp_path):
    folder = prepare_folder(tmp_path / "newcomer", tiny_backbone_dir, max_rows=FIRST_ROWS)
    blocks = [block for block in read_blocks(ROOT / "README.md") if block.runs]
    (own,) = (block for block in blocks if block.heading == "Your own data" and "ratings.csv" in block.text)
    ask, make_and_score, next_night = (block for block in blocks if block.heading == "Ranking")

    printed = run_block(own, folder)
    assert "user_id" in printed  # preview of the columns
    assert json.loads(printed.splitlines()[-1])["state"] == "done"
    manifest = json.loads((folder / "runs" / "mine" / "data" / "manifest.json").read_text())
    assert sum(split["rows"] for split in manifest["splits"].values()) == FIRST_ROWS

    lines = [RANKED_LINE.fullmatch(line) for line in run_block(ask, folder).splitlines()]
    ranked = [found for found in lines if found is not None]
    titles = pd.read_csv(folder / "items.csv").set_index("item_id")["title"]
    assert [int(ranked_item[1]) for ranked_item in ranked] == list(range(1, 11))
    assert [ranked_item[4] for ranked_item in ranked] == titles[[ranked_item[2] for ranked_item in ranked]].tolist()
    scores = [float(ranked_item[3]) for ranked_item in ranked]
    assert scores == sorted(scores, reverse=True)

    run_block(make_and_score, folder)
    table = pd.read_parquet(folder / "ranked" / "scores")
    assert table["rank"].tolist() == list(range(1, 51))
    assert not {"B004", "B011"} & set(table["item_id"])  # liked items are not recommended again

    append_ratings(folder, FIRST_ROWS, FIRST_ROWS + NEW_ROWS)
    status = json.loads(run_block(next_night, folder).splitlines()[-1])
    report = json.loads((folder / "runs" / "night-2" / "eval" / "report.json").read_text())
    (difference,) = (
        row
        for row in report["differences"]
        if (row["split"], row["slice"], row["model"], row["versus"]) == ("test", "all", "stage2", "previous")
    )
    passes = difference["auc_low"] >= -0.01
    assert status["state"] == ("promoted" if passes else "rejected")
    pointer = folder / "runs" / "current"
    assert pointer.is_symlink() == passes
    assert not passes or pointer.resolve() == folder / "runs" / "night-2"
