"""A new user's first two days: the demo and its page, their own CSV file, and the commands of README, verbatim."""

import json
import os
import re
import shlex
import sys
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from tests.doc_blocks import ROOT, read_blocks
from tests.integration.docs_folder import append_ratings, prepare_folder, run_block, shrink_config
from tests.integration.ranking_service import running

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


SERVE = re.compile(r"`(python launch/serve\.py\s[^`]*)`, then open <(http://127\.0\.0\.1:\d+)>")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_make_demo_to_the_page(tiny_backbone_dir, tmp_path, monkeypatch):
    """The demo's configuration with a tiny backbone and invented ratings; a person looks at the page in a browser."""
    pytest.importorskip("selenium", reason="needs pip install 'collm-dist[docs]'")
    from tests.integration.test_page_in_browser import Page
    from tests.integration.test_screenshots import load_script

    script = load_script()
    folder = prepare_folder(tmp_path / "newcomer", tiny_backbone_dir)
    replace_data(folder / "configs" / "ml100k_demo.yaml")
    (block,) = (block for block in read_blocks(ROOT / "README.md") if block.heading == "Two commands")
    (demo,) = (line for line in block.text.splitlines() if line.startswith("make demo"))
    monkeypatch.setenv("VENV", sys.prefix)  # the environment is there
    printed = run_block(replace(block, text=f"{demo}\n"), folder)
    command, address = SERVE.search((ROOT / "README.md").read_text(encoding="utf-8")).groups()
    command = " ".join(command.split())
    assert command in printed.replace(f"{sys.prefix}/bin/", "")  # the demo ends with the same hint
    assert f"open {address} in a browser" in printed
    assert address.endswith(":8000")  # elsewhere in this test, as others may listen there
    words = [sys.executable, *shlex.split(command)[1:], "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with running(words, folder, environment) as service, script.open_browser() as window:
        page = Page(window, f"http://127.0.0.1:{service.port}/")
        page.open()
        page.like("Film 17 ")
        page.search("Film 40 ")
        page.find("#results .disliked").click()
        assert page.read("#picks-liked bdi") == "Film 17 (1977)"
        assert page.read("#picks-disliked bdi") == "Film 40 (1960)"
        page.compare()
        page.await_lists()
        lists = [page.read_list(key) for key in ("popularity", "collaborative", "language_model")]
        for rows in lists:
            assert [int(rank) for rank, _, _ in rows] == list(range(1, 11))
            assert not {"Film 17 (1977)", "Film 40 (1960)"} & {title for _, title, _ in rows}
        assert len({tuple(title for _, title, _ in rows) for rows in lists}) == 3
        assert window.get_log("browser") == []


def replace_data(path):
    """Let the demo's configuration read the ratings of the folder with a tiny backbone."""
    shrink_config(path)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    del config["dataset"]["asset"]
    config["dataset"] |= {"path": "ratings.csv", "items_path": "items.csv", "columns": {"rating": "rating"}}
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
