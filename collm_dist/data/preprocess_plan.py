"""Settings, folders and intermediate files of preprocessing, shared by the driver and its tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from collm_dist.config import DatasetConfig, PreprocessingConfig


@dataclass(frozen=True)
class PreprocessPlan:
    """Settings and folders of a preprocessing run.

    Attributes:
        work_dir: folder of the intermediate files.
        data_dir: folder of the final files.
        dataset, preprocessing, seed, num_candidates: settings.
    """

    work_dir: Path
    data_dir: Path
    dataset: DatasetConfig
    preprocessing: PreprocessingConfig
    seed: int
    num_candidates: int

    @property
    def num_buckets(self) -> int:
        """Number of user buckets."""
        return self.preprocessing.num_user_buckets

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
