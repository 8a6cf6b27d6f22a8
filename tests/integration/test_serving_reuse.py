"""The benchmark of returning users, at toy size: both parts, and what it writes."""

import json
import sys

import pytest

from benchmarks import serving_reuse
from benchmarks.lib.random_replica import Traffic


def run_main(monkeypatch, folder, *arguments):
    command = ["serving_reuse", "--shape", "tiny", "--threads", "1", "--output", str(folder), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    serving_reuse.main()
    (path,) = folder.iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


def test_both_parts_stand_in_one_file(tmp_path, monkeypatch):
    record = run_main(monkeypatch, tmp_path, "--requests", "4")
    case = record["parts"]["returning"]["cases"]["90%"]
    assert case["hit_rate"] > 0.3
    assert case["largest_difference"] < 1e-5  # float32 sums in another order
    assert 0 < case["kept_bytes"] <= record["parts"]["returning"]["reuse_bytes"]
    assert len(case["samples_ms"]["off"]) == len(case["samples_ms"]["on"]) == len(case["load_average"]) == 4
    assert record["parts"]["returning"]["ratio"]["90%"] == case["ratio"]
    record = run_main(monkeypatch, tmp_path, "--published", "--seconds", "0.1", "--trials", "2", "--limit-ms", "60000")
    published = record["parts"]["published"]
    assert record["parts"]["returning"]["ratio"]["90%"] == case["ratio"]
    assert [(found["returning"], found["reuse_bytes"] > 0) for found in published["cases"]] == [
        (0.0, False), (0.0, True), (0.5, True), (0.9, True)
    ]  # fmt: skip
    for found in published["cases"]:  # every rate holds a limit of a minute, so the second trial is of a higher rate
        assert [trial["holds"] for trial in found["trials"]] == [True, True]
        assert found["items_per_second"] == pytest.approx(10 * found["trials"][1]["rate"])
    assert 280 < published["prompt_tokens"] <= 300
    assert published["context_tokens"] < published["prompt_tokens"]


def test_traffic_has_the_share_of_returning_users_that_was_asked_for():
    traffic = Traffic(0.9, 25, 10, seed=3)
    users = [traffic.draw().user for _ in range(500)]
    assert len(set(users)) / len(users) == pytest.approx(0.1, abs=0.03)
