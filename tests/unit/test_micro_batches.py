import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.data.prompts.micro_batches import (
    MAX_TREE_TOKENS,
    MAX_TREE_TOKENS_WITHOUT_TAIL,
    count_longest,
    plan_micro_batches,
)
from collm_dist.data.prompts.prompt_layout import TokenCounts
from collm_dist.data.prompts.target_groups import find_groups
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.errors import ConfigError
from tests.unit.loader_data import make_contexts
from tests.unit.test_context_block import list_samples


@st.composite
def batches(draw):
    targets = draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    size = st.integers(0, 20)
    counts = TokenCounts(
        prefix=np.array([draw(size) for _ in targets]),
        tail=np.array([draw(size) for _ in targets]),
        branch=np.array([draw(st.integers(1, 20)) for _ in range(sum(targets))]),
        header=draw(size),
    )
    return make_contexts(targets), counts


def measure(block, counts, micro_batch):
    """Return tokens including the header, derived from row ids."""
    rows = micro_batch.row_id - block.row_id[0]
    owners = block.target_contexts[rows]
    total = counts.header + counts.prefix[np.unique(owners)].sum() + counts.branch[rows].sum()
    for context in range(micro_batch.num_contexts):
        targets = slice(*micro_batch.target_offsets[context : context + 2])
        owner = owners[targets][0]
        assert len(set(owners[targets].tolist())) == 1
        total += counts.tail[owner]
    return total


@settings(max_examples=400, deadline=None)
@given(batch=batches(), world_size=st.integers(1, 5), max_tokens=st.integers(80, 300))
def test_plans_cover_all_rows_within_the_budget(batch, world_size, max_tokens):
    block, counts = batch
    plans = [plan_micro_batches(block, counts, rank, world_size, max_tokens) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    real = [part for plan in plans for part in plan if part is not None]
    assert sorted(list_samples(concatenate_blocks(real))) == sorted(list_samples(block))
    assert all(measure(block, counts, micro_batch) <= max_tokens for micro_batch in real)
    assert any(None not in plan for plan in plans)
    owners = block.target_contexts
    totals = counts.prefix + counts.tail + np.bincount(owners, weights=counts.branch, minlength=block.num_contexts)
    placed = [set(owners[micro_batch.row_id].tolist()) for micro_batch in real]
    for context in np.flatnonzero(totals <= max_tokens - counts.header):
        assert sum(context in contexts for contexts in placed) == 1


def test_ranks_get_about_the_same_number_of_tokens():
    block = make_contexts([1, 2, 3, 4] * 16)
    counts = TokenCounts(np.full(64, 50), np.full(64, 5), 10 + block.item_idx)
    loads = []
    for rank in range(4):
        plan = [
            micro_batch for micro_batch in plan_micro_batches(block, counts, rank, 4, 500) if micro_batch is not None
        ]
        loads.append(sum(55 * part.num_contexts + counts.branch[part.row_id].sum() for part in plan))
    assert max(loads) - min(loads) <= 0.02 * max(loads)


def test_no_micro_batch_is_a_small_remainder():
    block = make_contexts([1] * 11)
    counts = TokenCounts(np.full(11, 50), np.full(11, 5), np.full(11, 45), header=20)
    plan = plan_micro_batches(block, counts, 0, 1, 1030)  # ten contexts fit
    assert [part.num_contexts for part in plan] == [6, 5]


def test_more_ranks_than_contexts_get_fillers():
    block = make_contexts([2])
    counts = TokenCounts(np.array([3]), np.array([3]), np.array([4, 4]))
    assert [len(plan_micro_batches(block, counts, rank, 3, 100)) for rank in range(3)] == [1, 1, 1]
    assert plan_micro_batches(block, counts, 2, 3, 100) == [None]


def test_a_row_over_the_budget_is_refused():
    block = make_contexts([2, 1], first_row=40)
    counts = TokenCounts(np.array([30, 30]), np.array([5, 5]), np.array([10, 70, 10]))
    with pytest.raises(ConfigError, match="row 41 alone has 105 tokens; raise"):
        plan_micro_batches(block, counts, 0, 1, 100)
    assert len(plan_micro_batches(block, counts, 0, 1, 105)) == 2


def test_many_targets_stand_in_several_rows_that_share_their_prefix():
    block = make_contexts([100, 1])
    counts = TokenCounts(np.array([130, 130]), np.array([16, 16]), np.full(101, 50))
    (plan,) = plan_micro_batches(block, counts, 0, 1, 100_000)
    widths = np.diff(plan.target_offsets) * 50 + 16
    assert widths.max() <= MAX_TREE_TOKENS
    assert plan.num_contexts == 25 + 1
    assert sorted(plan.row_id) == sorted(block.row_id)
    several = plan_micro_batches(block, counts, 0, 1, 2048)
    assert all(measure(block, counts, micro_batch) <= 2048 for micro_batch in several)
    assert len(several) == 5  # four for the hundred, one for the other context


def test_without_a_tail_to_repeat_rows_are_shorter():
    block = make_contexts([100, 1])
    counts = TokenCounts(np.array([146, 146]), np.array([0, 0]), np.full(101, 50))
    (plan,) = plan_micro_batches(block, counts, 0, 1, 100_000)
    assert (np.diff(plan.target_offsets) * 50).max() <= MAX_TREE_TOKENS_WITHOUT_TAIL
    assert plan.num_contexts == 50 + 1


def test_without_a_prefix_a_context_stays_one_row():
    block = make_contexts([100])
    counts = TokenCounts(np.array([0]), np.array([146]), np.full(100, 50))
    (plan,) = plan_micro_batches(block, counts, 0, 1, 100_000)
    assert plan.num_contexts == 1


@settings(max_examples=300, deadline=None)
@given(batch=batches(), world_size=st.integers(1, 4), spare=st.integers(0, 200), data=st.data())
def test_groups_stay_in_one_micro_batch(batch, world_size, spare, data):
    block, counts = batch
    lists = [
        data.draw(st.sampled_from(np.flatnonzero(block.target_contexts == owner))) for owner in block.target_contexts
    ]
    block = dataclasses.replace(block, group_id=np.array(lists))
    groups = find_groups(block)
    max_tokens = count_longest(block, counts, groups) + spare
    plans = [plan_micro_batches(block, counts, rank, world_size, max_tokens, groups) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    real = [part for plan in plans for part in plan if part is not None]
    assert sorted(list_samples(concatenate_blocks(real))) == sorted(list_samples(block))
    assert all(measure(block, counts, micro_batch) <= max_tokens for micro_batch in real)
    placed = [set(groups[micro_batch.row_id].tolist()) for micro_batch in real]
    assert sum(map(len, placed)) == len(set(groups.tolist()))


def test_groups_are_whole_lists_of_one_context_up_to_a_size():
    block = make_contexts([40, 3, 30])
    assert np.bincount(find_groups(block)).tolist() == [16, 16, 8, 3, 16, 14]
    lists = np.concatenate([np.arange(40) % 8, [40, 40, 41], np.full(20, 50), np.full(10, 51)])
    groups = find_groups(dataclasses.replace(block, group_id=lists))
    # Three lists of five, twice, and the remaining two; two lists; a list over the size, then the last one.
    assert np.bincount(groups).tolist() == [15, 15, 10, 3, 20, 10]
    assert set(lists[groups == 1].tolist()) == {3, 4, 5}


def test_a_group_over_the_budget_is_refused():
    block = make_contexts([2, 3], first_row=40)
    counts = TokenCounts(np.array([30, 30]), np.array([5, 5]), np.full(5, 30), header=10)
    groups = find_groups(block)
    with pytest.raises(ConfigError, match=r"the 3 targets from row 42 on, which the loss compares, .* have 135 tokens"):
        plan_micro_batches(block, counts, 0, 1, 134, groups)
    assert len(plan_micro_batches(block, counts, 0, 1, 135, groups)) == 2
