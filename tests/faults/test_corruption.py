"""A part of the corruption run: some files of a run, of its publication and of its export, each in some ways."""

import json
import random
from functools import partial

import pytest

from tests.faults.corruption import FAILURES, RESULTS, WAYS, Case, begin, count, run_cases, save
from tests.faults.corruption_uses import make_bench
from tests.faults.forked_cases import run_forked
from tests.faults.render import render_corruption

FILES = {
    "load": ("cf/model.safetensors", "stage2/summary.json", "stage1/merged/tokenizer.json"),
    "publish": ("stage2/mapping.safetensors", "data/shards/train-00000.tar", "cf/metrics.jsonl"),
    "publish again": ("data/users.parquet", "stage1/published.json"),
    "load published": ("data/manifest.json", "config.yaml"),
    "export": ("stage1/adapter/adapter_config.json", "data/items.parquet"),
    "import": ("export.json", "records/stage2.json", "model/model.safetensors"),
}
WAYS_EACH = 4


@pytest.fixture(scope="module")
def bench(finished, tmp_path_factory):
    return make_bench(finished / "run", tmp_path_factory.mktemp("bench"), steps=("data", "cf", "stage1", "stage2"))


@pytest.fixture(scope="module")
def ended(bench, tmp_path_factory):
    """Some cases of all uses that take milliseconds, with their outcomes."""
    dice = random.Random(1)
    cases = [
        Case(use, file, way) for use, files in FILES.items() for file in files for way in dice.sample(WAYS, WAYS_EACH)
    ]
    return list(run_cases(bench, cases, 1, tmp_path_factory.mktemp("cases")))


def test_each_case_is_refused_or_healed_or_without_effect(ended):
    assert len(ended) == sum(map(len, FILES.values())) * WAYS_EACH
    assert [(case, outcome) for case, outcome in ended if outcome[0] in FAILURES] == []
    refused = [message for _, (outcome, message) in ended if outcome == "refused"]
    # What changes nothing: a log, and bits in comments, paths and numbers that ranking does not use.
    assert len(refused) >= len(ended) / 2
    assert all(refused)


def test_a_damaged_publication_is_healed_by_publishing_again(ended):
    ends = [outcome for case, (outcome, _) in ended if case.use == "publish again"]
    assert ends.count("healed") >= len(ends) - 2  # a directory in the place of a file, or a file that nobody may read


def test_counts_and_resuming(tmp_path):
    results = {"kill_points": 3}
    found = begin({}, 0, 2)
    count(found, Case("load", "a", "cut"), ("refused", "a is damaged"))
    found = save(tmp_path / "r.json", results, found)
    assert begin({"corruption": found}, 0, 2) == found
    assert begin({"corruption": found}, 1, 2)["corruptions"] == 0
    count(found, Case("load", "a", "junk"), ("hang", "after 300 seconds"))
    found = save(tmp_path / "r.json", results, found)
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "kill_points": 3, "corruption": found, "corruptions": 2, "silently_different": 0, "tracebacks": 1
    }  # fmt: skip
    assert "2 cases: 1 refused with a message, 0 healed" in render_corruption({"corruption": found})
    assert render_corruption({}).endswith("| not run yet |")


def _end(outcome, message):
    if outcome == "crash":
        raise SystemExit(3)
    return outcome, message


def test_outcomes_of_forked_cases_come_in_order(tmp_path):
    cases = [partial(_end, outcome, str(number)) for number, outcome in enumerate(("refused", "crash", "healed"))]
    outcomes = list(run_forked(cases, tmp_path, 2, float("inf")))
    assert [outcome for outcome, _ in outcomes] == ["refused", "crash", "healed"]
    assert list(run_forked(cases, tmp_path / "late", 2, 0.0)) == []


def test_the_last_whole_run_lost_nothing():
    results = json.loads(RESULTS.read_text())
    assert results["corruptions"] >= 1000
    assert (results["silently_different"], results["tracebacks"]) == (0, 0)
    assert set(results["corruption"]["uses"]) == {*FILES, "evaluate", "resume"}
