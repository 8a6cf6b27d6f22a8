"""Counts of buckets and shards follow the size of the input."""

import pytest

from collm_dist.config import PreprocessingConfig
from collm_dist.data.preprocess_plan import resolve_counts

MIB = 1 << 20


@pytest.mark.parametrize(
    ("files", "previous", "expected"),
    [
        ({"a.csv": 60_000}, 0, (1, 1)),
        ({"a.csv": 9 * MIB, "b.csv": 3 * MIB}, 0, (4, 1)),
        ({"a.csv.gz": 9 * MIB}, 0, (10, 3)),
        ({"a.pq": 9 * MIB}, 0, (10, 3)),
        ({"a.csv.zstd": 9 * MIB}, 0, (10, 3)),
        ({"a.jsonl.lz4": 9 * MIB}, 0, (10, 3)),
        ({"a.json.br": 9 * MIB}, 0, (10, 3)),
        ({"a.parquet": 5_000 * MIB}, 0, (256, 16)),
        ({"a.csv": 60_000}, 32, (32, 1)),
    ],
)
def test_auto_follows_the_size_or_the_run_that_is_extended(files, previous, expected):
    inputs = {name: {"size": size, "mtime_ns": 1} for name, size in files.items()}
    counts = resolve_counts(PreprocessingConfig(), inputs, previous)
    assert (counts.num_user_buckets, counts.num_shards) == expected


def test_given_counts_stay():
    given = PreprocessingConfig(num_user_buckets=7, num_shards=3)
    assert resolve_counts(given, {"a.csv": {"size": 10**10, "mtime_ns": 1}}, 32) == given
