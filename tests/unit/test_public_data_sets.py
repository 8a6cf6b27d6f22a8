"""The settings of docs/own-data-formats.md read files in the shapes of the public data sets."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.source import open_source
from tests.doc_blocks import ROOT, read_blocks
from tests.unit.public_files import CASES
from tests.unit.test_readers import read

BLOCKS = read_blocks(ROOT / "docs" / "own-data-formats.md")
SETTINGS = {block.heading: yaml.safe_load(block.text)["dataset"] for block in BLOCKS if block.language == "yaml"}


def test_every_data_set_of_the_page_is_tested():
    assert SETTINGS.keys() == CASES.keys()
    assert sum(block.language == "yaml" for block in BLOCKS) == len(SETTINGS)


@pytest.mark.parametrize("heading", CASES)
def test_settings_read_the_published_shape(heading, tmp_path, monkeypatch):
    case, settings = CASES[heading], SETTINGS[heading]
    monkeypatch.chdir(tmp_path)
    for name, data in case.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for block in BLOCKS:
        if block.heading == heading and block.language in ("bash", "python"):
            command = ["bash", "-ec"] if block.language == "bash" else [sys.executable, "-c"]
            subprocess.run([*command, block.text], check=True, cwd=tmp_path)
    rows, bad, examples = read(**settings)
    assert bad == {}, examples
    has_times = settings.get("columns", {}).get("timestamp", "") is not None
    found = rows[["user_id", "item_id", "timestamp", "label"]].values.tolist()
    assert [(user, item, time if has_times else None, label) for user, item, time, label in found] == case.rows
    items = open_source(DatasetConfig.model_validate(settings)).read_items()
    texts = zip(items.table["item_id"].to_pylist(), items.table["text"].to_pylist(), strict=True)
    assert (dict(texts), items.bad_rows.counts) == (case.texts, {})
