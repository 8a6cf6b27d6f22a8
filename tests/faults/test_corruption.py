"""A part of the corruption run: weights, records and tables of a run and of its export, each damaged in every way."""

import json

import pytest

from tests.faults.corruption import RESULTS, WAYS, make_benches, run_cases

FILES = {
    "run": {
        "cf/model.safetensors",
        "stage1/merged/tokenizer.json",
        "stage2/mapping.safetensors",
        "stage2/summary.json",
    },
    "export": {"export.json", "config.yaml", "records/stage2.json", "model/model.safetensors"},
}


@pytest.fixture(scope="module")
def benches(finished, tmp_path_factory):
    return make_benches(finished / "run", tmp_path_factory.mktemp("benches"))


@pytest.mark.parametrize("kind", FILES)
def test_each_case_is_refused_or_without_effect(benches, kind):
    found = run_cases({kind: benches[kind]}, 1, 1, lambda _, name, way: name in FILES[kind])
    assert found["corruptions"] == len(FILES[kind]) * len(WAYS)
    assert found["failures"] == []
    # A flipped bit of the settings may be in a comment, of a path, or in a number that ranking does not use.
    assert found["refused"] >= found["corruptions"] - 3


def test_the_last_whole_run_lost_nothing():
    results = json.loads(RESULTS.read_text())
    assert results["corruptions"] >= 300
    assert (results["silently_different"], results["tracebacks"]) == (0, 0)
