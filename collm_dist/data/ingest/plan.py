"""What all tasks of preprocessing share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from collm_dist.config import DatasetConfig, PreprocessingConfig


@dataclass(frozen=True)
class Plan:
    """Folders and settings.

    Attributes:
        work, data_dir: folders of intermediate and of final files.
        dataset, preprocessing, seed, num_candidates: settings.
    """

    work: Path
    data_dir: Path
    dataset: DatasetConfig
    preprocessing: PreprocessingConfig
    seed: int
    num_candidates: int

    @property
    def num_buckets(self) -> int:
        """User buckets."""
        return self.preprocessing.num_user_buckets

    @property
    def draws_per_row(self) -> int:
        """Sampled negatives that one positive gets at the most; as many row ids are set aside for it."""
        if self.dataset.feedback != "implicit":
            return 0
        return max(self.dataset.negatives_per_positive, self.num_candidates - 1)
