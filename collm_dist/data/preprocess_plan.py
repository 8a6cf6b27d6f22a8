"""Settings, folders and intermediate files of preprocessing, shared by the driver and its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from collm_dist.config import DatasetConfig, PreprocessingConfig
from collm_dist.data.ingest.file_format import PACKED_SUFFIXES, PARQUET_SUFFIXES

# Bytes of text per user bucket and per shard with ``auto``: a bucket then takes a second, and small data few files.
_BUCKET_BYTES, _SHARD_BYTES = 4 << 20, 16 << 20
_MAX_BUCKETS, _MAX_SHARDS = 256, 16
# Packed files stand for about this many times their size as text.
_PACKED = (*PARQUET_SUFFIXES, *chain.from_iterable(PACKED_SUFFIXES.values()))
_COMPRESSION = 4


def resolve_counts(preprocessing: PreprocessingConfig, inputs: Mapping[str, Any], previous: int) -> PreprocessingConfig:
    """Return the settings with numbers in place of ``auto``, which depend on the input files alone.

    Args:
        preprocessing: the settings.
        inputs: size of each input file by its name, as in ``Source.inputs``.
        previous: user buckets of the run that is extended; 0 = none.
    """
    size = sum(
        int(file["size"] or 0) * (_COMPRESSION if name.lower().endswith(_PACKED) else 1)
        for name, file in inputs.items()
    )
    buckets, shards = preprocessing.num_user_buckets, preprocessing.num_shards
    if buckets == "auto":
        buckets = previous or min(_MAX_BUCKETS, 1 + size // _BUCKET_BYTES)
    if shards == "auto":
        shards = min(_MAX_SHARDS, 1 + size // _SHARD_BYTES)
    return preprocessing.model_copy(update={"num_user_buckets": buckets, "num_shards": shards})


def _get_count(value: int | str) -> int:
    assert isinstance(value, int)  # resolved
    return value


@dataclass(frozen=True)
class PreprocessPlan:
    """Settings and folders of a preprocessing run.

    Attributes:
        work_dir: folder of the intermediate files.
        data_dir: folder of the final files.
        dataset, preprocessing, seed, num_candidates: settings, with the counts of buckets and shards resolved.
        stores_order: whether shards hold the order of a user's likes and dislikes.
    """

    work_dir: Path
    data_dir: Path
    dataset: DatasetConfig
    preprocessing: PreprocessingConfig
    seed: int
    num_candidates: int
    stores_order: bool = False

    @property
    def num_buckets(self) -> int:
        """Number of user buckets."""
        return _get_count(self.preprocessing.num_user_buckets)

    @property
    def num_shards(self) -> int:
        """Number of shards per split."""
        return _get_count(self.preprocessing.num_shards)

    @property
    def max_negatives_per_row(self) -> int:
        """Most negatives sampled for one positive; as many row ids are reserved for it."""
        if self.dataset.feedback != "implicit":
            return 0
        return max(self.dataset.negatives_per_positive, self.num_candidates - 1)

    def work_file(self, kind: str, index: int, part: str = "") -> Path:
        """Return the path of an intermediate Arrow file.

        Args:
            kind: which task wrote it, for example ``filtered``.
            index: chunk, bucket or item part.
            part: distinguishes several files of one task, for example ``users``.
        """
        return self.work_dir / f"{kind}-{index:05d}{'.' if part else ''}{part}.arrow"
