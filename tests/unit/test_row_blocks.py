"""Division of rows into padded blocks."""

from __future__ import annotations

import numpy as np
import pytest

from collm_dist.llm.packed.row_blocks import split_rows

WHOLE = 1 << 62  # more than any padding costs


def count_wasted_pairs(spans, lengths, pasts, header):
    """Return the query-key pairs of each span that padding adds."""
    needed = lengths * (header + pasts + lengths)
    return [
        (span.rows.stop - span.rows.start) * span.columns * (header + span.past + span.columns)
        - int(needed[span.rows].sum())
        for span in spans
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cost", [0, 500, 10_000, WHOLE])
def test_every_row_is_in_one_span_and_no_span_wastes_more_than_a_span_costs(seed, cost):
    random = np.random.default_rng(seed)
    lengths, pasts = np.sort(random.integers(1, 60, 30)), random.integers(0, 90, 30)
    spans = split_rows(lengths, pasts, 7, cost)
    assert np.concatenate([np.arange(30)[span.rows] for span in spans]).tolist() == list(range(30))
    ends = np.cumsum(lengths)
    for span in spans:
        assert (span.columns, span.past) == (lengths[span.rows].max(), pasts[span.rows].max())
        assert span.tokens == slice(ends[span.rows.start] - lengths[span.rows.start], ends[span.rows.stop - 1])
    assert min(count_wasted_pairs(spans, lengths, pasts, 7)) >= 0
    if cost == WHOLE:
        assert len(spans) == 1
    else:
        assert max(count_wasted_pairs(spans, lengths, pasts, 7)) <= cost
        # No span has room for the first row of the next span.
        for span in spans[:-1]:
            rows = slice(span.rows.start, span.rows.stop + 1)
            longer = split_rows(lengths[rows], pasts[rows], 7, WHOLE)
            assert count_wasted_pairs(longer, lengths[rows], pasts[rows], 7)[0] > cost


def test_rows_alike_stay_together_whatever_a_span_costs():
    alike = np.full(9, 12)
    assert len(split_rows(alike, alike, 3, 0)) == 1
