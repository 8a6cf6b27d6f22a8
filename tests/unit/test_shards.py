"""Shards: round trip, deterministic bytes, errors for damaged files."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import webdataset

from collm_dist.data.shards.context_block import OPTIONAL_FIELDS, ContextBlock, concatenate_blocks
from collm_dist.data.shards.shard_reader import decode_block, read_shard
from collm_dist.data.shards.shard_writer import encode_block, write_shard
from collm_dist.errors import ArtifactError
from tests.unit.loader_data import make_contexts


@pytest.fixture
def block() -> ContextBlock:
    return make_contexts([1 + number % 4 for number in range(23)], seed=4)


def assert_equal(left: ContextBlock, right: ContextBlock) -> None:
    for field in fields(ContextBlock):
        values, others = getattr(left, field.name), getattr(right, field.name)
        np.testing.assert_array_equal(values, others, err_msg=field.name)
        assert (field.name in OPTIONAL_FIELDS and values is None) or others.dtype == np.int64


def test_a_block_survives_its_bytes_whatever_its_numbers(block):
    assert_equal(block, decode_block(encode_block(block)))
    wide = replace(
        block, item_idx=block.item_idx + 2**40, row_id=block.row_id + 2**40, timestamp=block.timestamp - 10**10
    )
    assert_equal(wide, decode_block(encode_block(wide)))


def test_records_come_back_in_order(tmp_path, block):
    info = write_shard(tmp_path, "train-00000.tar", "train", block, contexts_per_record=5)
    records = list(read_shard(tmp_path / info.path, info.sha256))
    assert [record.num_contexts for record in records] == [5, 5, 5, 5, 3]
    assert_equal(block, concatenate_blocks(records))
    assert (info.rows, info.contexts) == (block.num_targets, 23)
    assert info.bytes == (tmp_path / info.path).stat().st_size


def test_the_same_block_gives_the_same_bytes(tmp_path, block):
    first, second = (write_shard(tmp_path / name, "train-00000.tar", "train", block, 5) for name in ("a", "b"))
    assert first.sha256 == second.sha256


def test_a_shard_is_byte_for_byte_what_webdataset_writes(tmp_path, block):
    info = write_shard(tmp_path, "train-00000.tar", "train", block, 5)
    samples = list(webdataset.WebDataset(str(tmp_path / info.path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:08d}" for number in range(5)]
    with webdataset.TarWriter(str(tmp_path / "other.tar"), mtime=0, user="root", group="root") as writer:
        for sample in samples:
            records = {name: sample[name] for name in ("__key__", "contexts.safetensors")}
            writer.write(records)
    assert (tmp_path / "other.tar").read_bytes() == (tmp_path / info.path).read_bytes()


@pytest.mark.parametrize("keep", [0, 700, 0.5, -1])
def test_a_truncated_shard_is_named_with_both_checksums(tmp_path, block, keep):
    info = write_shard(tmp_path, "train-00000.tar", "train", block, 5)
    path = tmp_path / info.path
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ArtifactError, match=rf"train-00000\.tar: .*{info.sha256[:16]}.*--force data"):
        list(read_shard(path, info.sha256))


def test_a_shard_cut_in_a_record_is_refused_even_unchecked(tmp_path, block):
    info = write_shard(tmp_path, "train-00000.tar", "train", block, 5)
    path = tmp_path / info.path
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ArtifactError, match="train-00000"):
        list(read_shard(path))
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        list(read_shard(path))
