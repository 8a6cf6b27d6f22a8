"""Generated logs: exact number of rows, reproducible, skewed and learnable."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.lib import synthetic_logs
from benchmarks.lib.synthetic_logs import FIRST_TIME, SECONDS, write_synthetic_logs


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_logs, "ROWS_PER_FILE", 8_000)
    return write_synthetic_logs(tmp_path / "a", 20_000, seed=3)


def test_the_same_arguments_give_the_same_rows_in_any_folder(logs, tmp_path):
    again = write_synthetic_logs(tmp_path / "b", 20_000, seed=3)
    other = write_synthetic_logs(tmp_path / "c", 20_000, seed=4)
    assert pq.read_table(again.interactions).equals(pq.read_table(logs.interactions))
    assert not pq.read_table(other.interactions).equals(pq.read_table(logs.interactions))


def test_rows_and_columns(logs):
    files = sorted(logs.interactions.iterdir())
    assert [pq.read_metadata(path).num_rows for path in files] == [8_000, 8_000, 4_000]
    frame = pq.read_table(logs.interactions).to_pandas()
    assert list(frame.columns) == ["user_id", "item_id", "rating", "timestamp"]
    assert (len(frame), logs.num_users, logs.num_items) == (20_000, 400, 2_828)
    assert frame["user_id"].between(1, 400).all()
    assert frame["item_id"].between(1, 2_828).all()
    assert set(frame["rating"]) == {1, 2, 3, 4, 5}
    assert frame["timestamp"].between(FIRST_TIME, FIRST_TIME + SECONDS - 1).all()
    items = pq.read_table(logs.items).to_pydict()
    assert items["item_id"] == list(range(1, 2_829))
    assert len(set(items["title"])) == 2_828


def test_rows_are_in_no_order_and_files_follow_each_other_in_time(logs):
    frames = [pq.read_table(path).to_pandas() for path in sorted(logs.interactions.iterdir())]
    for frame in frames:
        assert 0.4 < (np.diff(frame["user_id"]) < 0).mean() < 0.6
        assert 0.4 < (np.diff(frame["timestamp"]) < 0).mean() < 0.6
    assert frames[0]["timestamp"].max() <= frames[1]["timestamp"].min()


def test_few_users_and_items_have_most_rows(logs):
    frame = pq.read_table(logs.interactions).to_pandas()
    for name, least in (("user_id", 0.25), ("item_id", 0.4)):
        counts = frame[name].value_counts()
        assert counts.iloc[: len(counts) // 10].sum() > least * 20_000


def test_mean_ratings_of_users_and_items_predict_further_ratings(logs):
    frame = pq.read_table(logs.interactions).to_pandas()
    for name in ("user_id", "item_id"):
        halves = [frame[frame.index % 2 == half].groupby(name)["rating"] for half in (0, 1)]
        means = [half.mean()[half.size() >= 10] for half in halves]
        assert means[0].corr(means[1]) > 0.3
