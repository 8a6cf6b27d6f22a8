"""The sample of batches that stands for an epoch, and the summary of two sides' times and memory."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.lib.tuning_comparison import merge_rounds, summarize_pair
from benchmarks.lib.tuning_workload import MIX_TOLERANCE, draw_sample


def test_a_sample_has_the_contexts_of_the_epoch():
    contexts = np.random.default_rng(0).integers(8, 32, 1000).tolist()
    places, mean = draw_sample(contexts, 10)
    assert mean == pytest.approx(np.mean(contexts))
    assert len(set(places)) == 10
    drawn = [contexts[place] for place in places]
    assert np.mean(drawn) == pytest.approx(mean, rel=MIX_TOLERANCE)
    assert max(drawn) - min(drawn) > 15  # not all of them close to the mean
    assert drawn != sorted(drawn)
    assert places == draw_sample(contexts, 10)[0]


def test_a_sample_that_cannot_stand_for_the_epoch_is_refused():
    with pytest.raises(SystemExit, match="raise --batches"):
        draw_sample([10] * 50 + [30] * 50, 1)


def test_summary_of_two_sides():
    ours = [{"seconds": 1.0, "extra_bytes": 2**30}, {"seconds": 2.0, "extra_bytes": 2**29}]
    theirs = [{"seconds": 3.0, "extra_bytes": 2**31}, {"seconds": 3.0, "extra_bytes": 2**32}]
    summary = summarize_pair({"ours": ours, "peer": theirs})
    assert summary["speedup"] == 2.0
    assert summary["speedup_by_batch"] == [3.0, 1.5]
    assert summary["speedup_95"] == [1.5, 3.0]
    assert summary["peak_extra_gib"] == {"ours": 1.0, "peer": 4.0}
    assert summary["memory_share"] == 0.25


def test_rounds_give_a_median_and_the_largest_memory():
    answers = [(0, {"seconds": seconds, "extra_bytes": size}) for seconds, size in ((1.0, 5), (9.0, 7), (2.0, 6))]
    (sample,) = merge_rounds(answers, 1)
    assert sample == {"seconds": 2.0, "extra_bytes": 7, "all_seconds": [1.0, 9.0, 2.0]}
