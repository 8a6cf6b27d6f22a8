"""The data step on logs as people have them: without times, with ids in several forms, with lost item rows."""

from __future__ import annotations

import pytest

from collm_dist.data.samples.splits import SPLITS
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.orchestration.cluster import connect_ray
from tests.integration.preprocess_runs import list_samples, make_config, preprocess, write_csv


@pytest.fixture(scope="module", autouse=True)
def _ray():
    config = make_config({"path": "unused", "columns": {"label": "label"}}, "unused")
    with connect_ray(config.cluster):
        yield


def test_the_order_of_the_rows_stands_for_missing_times(tmp_path):
    """Without timestamps the result is that of a log whose timestamps are the row numbers."""
    lines = "".join(f"{n % 4},{n % 6},{n % 5 + 1}\n" for n in range(60))
    (tmp_path / "log.csv").write_text(f"user_id,item_id,rating\n{lines}")
    untimed = {"path": str(tmp_path / "log.csv"), "columns": {"rating": "rating", "timestamp": None}}
    timed = write_csv(tmp_path / "numbered", [f"{n % 4},{n % 6},{n},{n % 5 + 1}" for n in range(60)])
    for name, dataset in (("untimed", untimed), ("timed", timed)):
        preprocess(make_config(dataset, tmp_path / name, pre={"ties": "order"}))
    samples = list_samples(tmp_path / "untimed")
    assert len(samples) == 60
    assert samples == list_samples(tmp_path / "timed")
    rows = load_interactions(tmp_path / "untimed" / "data", ("row_id", "split"))
    firsts = {name: rows["row_id"][rows["split"] == name].min() for name in SPLITS}
    assert firsts == {"train": 0, "valid": 48, "test": 54}
