import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import TokenCounts
from collm_dist.data.shards import global_order
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder, slice_targets
from collm_dist.errors import ArtifactError, DataError
from collm_dist.random_keys import hash_integers
from tests.unit.loader_data import make_contexts, write_split
from tests.unit.test_context_block import list_samples

COUNTS = [3, 1, 2, 5, 1, 1, 4, 2, 1, 9, 1, 2, 3, 1, 1, 6, 2, 1, 1, 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    block = make_contexts(COUNTS)
    return folder, write_split(folder, block, num_shards=9), block


def list_rows(batches):
    return [batch.row_id.tolist() for batch in batches]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 60),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    world_size=st.integers(1, 4),
    num_shards=st.integers(1, 9),
)
def test_every_row_once_an_epoch_whatever_the_process_count(size, seed, epoch, world_size, num_shards):
    block = make_contexts(COUNTS)
    with tempfile.TemporaryDirectory() as folder:
        order = GlobalOrder(Path(folder), write_split(Path(folder), block, num_shards), "train", seed, size)
        batches = list(order.iter_batches(epoch))
    assert [batch.num_targets for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches) == order.steps_per_epoch == -(-sum(COUNTS) // size)
    assert sorted(list_samples(concatenate_blocks(batches))) == sorted(list_samples(block))
    for batch in batches:
        counts = TokenCounts(
            np.zeros(batch.num_contexts, np.int64), np.full(batch.num_contexts, 7), 1 + batch.item_idx % 5
        )
        shares = [plan_micro_batches(batch, counts, rank, world_size, 40) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        real = [entry for share in shares for entry in share if entry is not None]
        assert sorted(list_samples(concatenate_blocks(real))) == sorted(list_samples(batch))


@pytest.mark.parametrize("size", [1, 4, 7, 48, 100])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("max_contexts", [None, 11])
def test_resume_equals_the_tail(data, size, shuffle, max_contexts):
    folder, manifest, _ = data
    order = GlobalOrder(folder, manifest, "train", 3, size, max_contexts=max_contexts, shuffle=shuffle)
    whole = list_rows(order.iter_batches(2))
    for step in range(len(whole) + 2):
        again = GlobalOrder(folder, manifest, "train", 3, size, max_contexts=max_contexts, shuffle=shuffle)
        assert list_rows(again.iter_batches(2, start_step=step)) == whole[step:]


def test_resume_reads_only_the_shards_it_needs(data, monkeypatch):
    folder, manifest, _ = data
    order = GlobalOrder(folder, manifest, "train", 0, 2)
    read = []
    plain = global_order.read_shard
    monkeypatch.setattr(global_order, "read_shard", lambda path, sha: read.append(path) or plain(path, sha))
    list(order.iter_batches(0))
    assert len(read) == len(manifest.shards)
    read.clear()
    list(order.iter_batches(0, start_step=order.steps_per_epoch - 1))
    assert len(read) == len(manifest.shards) % global_order.WINDOW_SHARDS


def test_order_changes_with_epoch_and_seed_only(data):
    folder, manifest, _ = data

    def rows(seed, epoch, shuffle=True):
        return list_rows(GlobalOrder(folder, manifest, "train", seed, 8, shuffle=shuffle).iter_batches(epoch))

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1)
    assert rows(0, 0) != rows(1, 0)
    assert rows(0, 0, shuffle=False) == rows(1, 5, shuffle=False)


def test_split_contexts_are_counted(data):
    folder, manifest, _ = data
    for size in (1, 3, 5, 64):
        order = GlobalOrder(folder, manifest, "train", 0, size)
        batches = list(order.iter_batches(0))
        names = [set(zip(batch.user_idx.tolist(), batch.num_likes.tolist(), strict=True)) for batch in batches]
        appearances = [name for batch in names for name in batch]
        assert order.num_split_contexts == sum(appearances.count(name) > 1 for name in set(appearances))


@pytest.mark.parametrize("shuffle", [True, False])
def test_selection_takes_the_smallest_hashes(data, shuffle):
    folder, manifest, block = data
    order = GlobalOrder(folder, manifest, "train", 5, 8, max_contexts=6, max_users=4, shuffle=shuffle)
    users = sorted(set(block.user_idx.tolist()), key=lambda user: int(hash_integers(5, user)))[:4]
    contexts = [(u, n) for u, n in zip(block.user_idx.tolist(), block.num_likes.tolist(), strict=True) if u in users]
    contexts = set(sorted(contexts, key=lambda context: int(hash_integers(5, *context)))[:6])
    got = concatenate_blocks(list(order.iter_batches(0)))
    assert set(zip(got.user_idx.tolist(), got.num_likes.tolist(), strict=True)) == contexts
    assert order.num_contexts == len(contexts)
    assert order.num_rows == got.num_targets
    expected = [sample for sample in list_samples(block) if sample[0][:2] in contexts]
    assert sorted(list_samples(got)) == sorted(expected)


def test_slice_equals_take_targets():
    block = make_contexts(COUNTS)
    for start in range(block.num_targets):
        for stop in (start + 1, min(start + 9, block.num_targets), block.num_targets):
            expected = block.take_targets(np.arange(start, stop))
            got = slice_targets(block, start, stop)
            assert list_samples(got) == list_samples(expected)
            np.testing.assert_array_equal(got.target_offsets, expected.target_offsets)


def test_damaged_missing_and_empty(tmp_path):
    manifest = write_split(tmp_path, make_contexts(COUNTS), 3)
    with pytest.raises(DataError, match="'test' has no rows"):
        GlobalOrder(tmp_path, manifest, "test", 0, 4)
    path = tmp_path / manifest.shards[1].path
    content = path.read_bytes()
    path.write_bytes(content[:-2000])
    with pytest.raises(ArtifactError, match=path.name):
        list(GlobalOrder(tmp_path, manifest, "train", 0, 4).iter_batches(0))
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        list(GlobalOrder(tmp_path, manifest, "train", 0, 4).iter_batches(0))


def test_reader_thread_ends_with_the_iteration(data):
    folder, manifest, _ = data
    batches = GlobalOrder(folder, manifest, "train", 0, 4).iter_batches(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards")]
