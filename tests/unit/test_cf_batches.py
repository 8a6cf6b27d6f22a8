"""Ownership of rows, and batches that do not depend on the number of workers."""

import numpy as np
import pytest
import torch

from collm_dist.cf.batches import iter_batches, permute, take_before
from collm_dist.cf.user_shards import UserRanges, assign_buckets
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.manifest import BucketInfo
from tests.unit.cf_data import load_data, load_workers
from tests.unit.evaluation_run import NUM_USERS, write_data_step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_data_step(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("total", [1, 2, 3, 255, 256, 257, 5000])
def test_the_order_of_an_epoch_is_a_permutation(total):
    places = permute(np.arange(total), total, seed=1, epoch=2)
    assert sorted(places) == list(range(total))
    assert np.array_equal(permute(np.array([total // 2]), total, 1, 2), places[total // 2 : total // 2 + 1])
    if total > 100:
        assert not np.array_equal(places, permute(np.arange(total), total, 1, 3))
        assert not np.array_equal(places, permute(np.arange(total), total, 2, 2))
        assert abs(np.corrcoef(np.arange(total), places)[0, 1]) < 4 / total**0.5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_any_number_of_workers_draws_the_same_batches(num_slices, world_size, tmp_path):
    run_dir = write_data_step(tmp_path, num_slices=num_slices)
    manifest, whole = load_data(run_dir)
    rows = whole.splits["train"]
    expected = [list_rows(rows, whole.users, contexts) for contexts in iter_batches(rows, 64, seed=3, epoch=1)]
    assert sum(map(len, expected)) == rows.total_rows == manifest.splits["train"].rows
    assert len(set.union(*expected)) == rows.total_rows
    mean = rows.total_rows / len(expected)
    assert mean <= 64
    assert all(abs(len(batch) - mean) < 0.3 * mean for batch in expected)
    merged, numbers = [set() for _ in expected], []
    for users, owned in load_workers(run_dir, world_size, "train"):
        assert len(users.slices) == (1 if world_size == 1 else num_slices)
        numbers += owned.number(np.arange(owned.num_contexts)).tolist()
        for batch, contexts in zip(merged, iter_batches(owned, 64, seed=3, epoch=1), strict=True):
            batch |= list_rows(owned, users, contexts)
    assert merged == expected
    assert sorted(numbers) == list(range(rows.total_contexts))


def list_rows(rows, users, contexts):
    """Return the (user, time, item) of each row of a batch and check that contexts are complete."""
    batch, numbers = rows.take(contexts, 8)
    dense = users.to_dense()[batch.user_idx[batch.target_contexts]]
    listed = list(zip(dense.tolist(), rows.timestamp[numbers].tolist(), batch.item_idx.tolist(), strict=True))
    assert len(listed) == len(set(listed))
    offsets = rows.context_offsets
    assert len(listed) == int((offsets[contexts + 1] - offsets[contexts]).sum())
    return set(listed)


def test_histories_are_the_likes_strictly_before(run_dir):
    _, data = load_data(run_dir)
    everything = load_interactions(run_dir.step_dir("data"), ["user_idx", "item_idx", "timestamp", "label"])
    rows = data.splits["test"]
    batch, numbers = rows.take(torch.arange(rows.num_contexts), 5)
    for target, row in enumerate(numbers.tolist()):
        context = int(batch.target_contexts[target])
        before = (
            (everything["user_idx"] == int(batch.user_idx[context]))
            & (everything["timestamp"] < int(rows.timestamp[row]))
            & (everything["label"] == 1)
        )
        order = np.argsort(everything["timestamp"][before], kind="stable")
        expected = everything["item_idx"][before][order][-5:].tolist()
        history = batch.history[context]
        assert history[history >= 0].tolist() == expected


def test_take_before_returns_exactly_the_earlier_rows(run_dir):
    _, data = load_data(run_dir)
    rows = data.splits["train"]
    early = take_before(rows, 200)
    assert early.total_rows == int((rows.timestamp < 200).sum()) == len(early.label)
    assert int(early.timestamp.max()) < 200
    whole, numbers = early.take(torch.arange(early.num_contexts), 5)
    assert torch.equal(whole.item_idx, rows.item_idx[rows.timestamp < 200].long())
    assert torch.equal(early.row_users, rows.row_users[rows.timestamp < 200])
    assert len(numbers) == early.total_rows
    # The histories equal those among all rows, so they hold nothing later.
    everything, _ = rows.take(torch.arange(rows.num_contexts), 5)
    expected = everything.history[everything.target_contexts][rows.timestamp < 200]
    history = whole.history[whole.target_contexts]
    assert torch.equal(history, expected[:, expected.shape[1] - history.shape[1] :])
    assert (history >= 0).any()


def test_every_bucket_has_one_owner_and_shares_are_even():
    buckets = [
        BucketInfo(str(number), rows, ((number * 10, 10),), "") for number, rows in enumerate([9, 1, 5, 5, 8, 4])
    ]
    for world_size in (1, 2, 3, 6, 9):
        owned = [assign_buckets(buckets, rank, world_size) for rank in range(world_size)]
        assert [bucket for part in owned for bucket in part] == buckets
    assert [sum(bucket.rows for bucket in assign_buckets(buckets, rank, 2)) for rank in range(2)] == [15, 17]


def test_users_of_an_extended_run_are_numbered_in_the_order_of_their_indices():
    buckets = [BucketInfo("a", 1, ((0, 3), (10, 2)), ""), BucketInfo("b", 1, ((3, 4),), "")]
    users = UserRanges.from_buckets(buckets)
    assert users.slices == ((0, 7), (10, 2))
    dense = users.to_dense().numpy()
    assert dense.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11]
    assert users.to_local(dense).tolist() == list(range(9))
    assert users.num_users == 9 < NUM_USERS
