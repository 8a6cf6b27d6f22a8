"""Shuffle files: round trip in order, fixed hashes, no partial files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from collm_dist.data.ingest.shuffle_files import PartitionWriter, find_finished, finish_task, hash_text, read_partition

SCHEMA = pa.schema([("value", pa.int64())])


def test_parts_keep_the_order_of_files_and_rows(tmp_path):
    random = np.random.default_rng(0)
    expected: dict[int, list[int]] = {part: [] for part in range(5)}
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow", tmp_path / "empty.arrow"]
    for path in paths[:2]:
        with PartitionWriter(path, SCHEMA, 5) as writer:
            for _ in range(3):
                values, parts = random.integers(0, 1000, 20), random.integers(0, 4, 20)  # part 4 stays empty
                writer.write(pa.table({"value": values}), parts)
                for value, part in zip(values.tolist(), parts.tolist(), strict=True):
                    expected[part].append(value)
    with PartitionWriter(paths[2], SCHEMA, 5):
        pass
    for part in range(5):
        assert read_partition(paths, part, 5).column("value").to_pylist() == expected[part]


def test_user_buckets_are_the_same_on_every_machine_and_day():
    """Pinned: another hash would move users between buckets, and a run could not extend an older one."""
    values = [15289156711003816966, 2942329514374287502, 12845234230323030718]
    assert hash_text(pa.array(["1", "A2SUAM1J3GNN3B", "千と千尋"])).tolist() == values


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(pa.ArrowInvalid), PartitionWriter(tmp_path / "a.arrow", SCHEMA, 2) as writer:
        writer.write(pa.table({"value": ["no number"]}), np.array([0]))
    assert list(tmp_path.iterdir()) == []


def test_a_task_is_finished_while_its_outputs_are_there(tmp_path):
    marker, output = tmp_path / "task.json", tmp_path / "task.arrow"
    assert find_finished(marker, output) is None
    finish_task(marker, {"rows": 3})
    assert find_finished(marker, output) is None
    output.touch()
    assert find_finished(marker, output) == {"rows": 3}
