from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock, concatenate_blocks
from collm_dist.random_keys import hash_integers, to_unit_interval

PINNED = [17841399628923370677, 5704952132319151503, 16833097866645316574]


def make_block(targets_per_context: list[int], seed: int = 0) -> ContextBlock:
    """Return a block of random contexts with values distinct enough to detect a mix-up."""
    rng = np.random.default_rng(seed)
    num_contexts, num_targets = len(targets_per_context), sum(targets_per_context)
    history = rng.integers(0, 4, num_contexts)
    dislikes = rng.integers(0, 3, num_targets)
    return ContextBlock(
        user_idx=rng.integers(0, 1000, num_contexts),
        num_likes=rng.integers(0, 50, num_contexts),
        history_offsets=np.concatenate([[0], np.cumsum(history)]),
        history_items=rng.integers(0, 10**6, history.sum()),
        target_offsets=np.concatenate([[0], np.cumsum(targets_per_context)]).astype(np.int64),
        dislike_offsets=np.concatenate([[0], np.cumsum(dislikes)]),
        dislike_items=rng.integers(0, 10**6, dislikes.sum()),
        likes_since=rng.integers(0, 10**6, dislikes.sum()),
        **{name: rng.integers(0, 10**6, num_targets) for name in TARGET_FIELDS},
    )


def list_samples(block: ContextBlock) -> list[tuple]:
    """Return a block as plain Python rows, one per target."""
    samples = []
    for context in range(block.num_contexts):
        history = block.history_items[block.history_offsets[context] : block.history_offsets[context + 1]]
        for target in range(block.target_offsets[context], block.target_offsets[context + 1]):
            places = slice(*block.dislike_offsets[target : target + 2])
            dislikes = block.dislike_items[places]
            since = () if block.likes_since is None else tuple(block.likes_since[places].tolist())
            values = [int(getattr(block, name)[target]) for name in TARGET_FIELDS]
            state = (int(block.user_idx[context]), int(block.num_likes[context]), tuple(history.tolist()))
            samples.append((state, tuple(dislikes.tolist()), since, *values))
    return samples


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=8), data=st.data())
def test_take_targets_keeps_every_value(counts, data):
    block = make_block(counts)
    chosen = data.draw(st.lists(st.integers(0, max(block.num_targets - 1, 0)), max_size=10, unique=True))
    if block.num_targets == 0:
        return
    taken = block.take_targets(np.array(chosen, dtype=np.int64))
    expected = list_samples(block)
    assert list_samples(taken) == [expected[i] for i in chosen]
    assert np.all(np.diff(taken.target_offsets) >= 1)


def test_take_contexts_and_concatenate_are_inverse():
    block = make_block([2, 1, 3, 4])
    halves = [block.take_contexts(np.array([0, 1])), block.take_contexts(np.array([2, 3]))]
    joined = concatenate_blocks(halves)
    for field in fields(ContextBlock):
        np.testing.assert_array_equal(getattr(joined, field.name), getattr(block, field.name), err_msg=field.name)


def test_neighbouring_targets_of_one_context_share_it():
    block = make_block([3, 2])
    taken = block.take_targets(np.array([0, 2, 3, 1]))
    assert taken.num_contexts == 3
    assert taken.target_offsets.tolist() == [0, 2, 3, 4]


def test_hashes_are_pinned_and_uniform():
    # Sample order, negatives and shard placement all hang on these values: they must never change.
    assert [int(value) for value in hash_integers(7, [0, 1, -1], 5)] == PINNED
    uniform = to_unit_interval(hash_integers(0, np.arange(100_000)))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # Chi-square over 100 cells: mean 99, standard deviation 14.
    counts = np.histogram(uniform, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 4 * 14


@pytest.mark.parametrize("seeds", [(0, 1)])
def test_seeds_give_unrelated_hashes(seeds):
    first, second = (to_unit_interval(hash_integers(seed, np.arange(10_000))) for seed in seeds)
    assert len(np.intersect1d(first, second)) == 0
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
