"""Comparison with records: differences on the same and on another machine, and their messages."""

import json

import numpy as np
import pytest

from tests.golden.records import compare, describe_array, describe_machine, format_json, list_differences

RECORDED = {"loss": [0.5, 0.25], "steps": 4, "says": "valid auc 0.51, 4 rows", "content_hash": "ab"}


def test_a_difference_is_told_with_its_path_and_both_values():
    record = {"made_on": describe_machine(), "found": RECORDED}
    compare(record, RECORDED, "x.json")
    with pytest.raises(AssertionError, match=r"x\.json: 2 differences") as caught:
        compare(record, RECORDED | {"loss": [0.5, 0.25000000000000006], "more": 1}, "x.json")
    assert "$.loss[1]: 0.25 recorded, 0.25000000000000006 found" in str(caught.value)
    assert '$.more: "(absent)" recorded, 1 found' in str(caught.value)


def test_on_another_machine_numbers_may_differ_a_little():
    near = {"loss": [0.5, 0.2501], "steps": 4, "says": "valid auc 0.511, 4 rows", "content_hash": "cd"}
    assert list_differences(RECORDED, near, "$", False) == []
    for key, value in {"loss": [0.5, 0.27], "steps": 5, "says": "valid auc 0.51, 5 rows"}.items():
        assert len(list_differences(RECORDED, RECORDED | {key: value}, "$", False)) == 1
    assert len(list_differences(RECORDED, {"loss": [0.5, 0.25]}, "$", False)) == 2


def test_arrays_of_integers_are_compared_everywhere():
    for dtype, expected in ((np.int64, 1), (np.float32, 0)):
        one, other = (describe_array(np.array(values, dtype)) for values in ([1, 2, 4, 3], [1, 4, 2, 3]))
        assert len(list_differences(one, other, "$", False)) == expected
        assert len(list_differences(one, other, "$", True)) == 1


def test_numbers_keep_all_their_digits():
    value = {"a": [0.1 + 0.2, 1e-300, -0.0], "b": [{"c": "é\n"}] * 60}
    assert json.loads(format_json(value)) == value
