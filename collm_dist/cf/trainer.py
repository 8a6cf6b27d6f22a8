"""Training of a collaborative-filtering model: pointwise BCE, Adam, early stop. Plain torch, no DataLoader.

A step's rows are those of one global batch, and the batches are a function of the seed, the epoch and the batch size
alone. A worker computes the share of the loss of the rows whose users it owns; losses are divided by the rows of the
whole batch and gradients are summed, so any number of workers makes the same steps within rounding.

Shapes: N training rows in all, B rows of a global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from collm_dist.cf.checkpoint import TrainingState
from collm_dist.data.hashing import hash_integers
from collm_dist.errors import ArtifactError, DataError
from collm_dist.evaluation.metrics import compute_auc, compute_logloss, compute_uauc

IntArray = NDArray[np.int64]
Metric = Literal["auc", "uauc", "logloss"]
_SCORE_ROWS = 1 << 18


@dataclass(frozen=True)
class Rows:
    """Labelled pairs, sorted by user.

    Attributes:
        user_idx, item_idx: (N,) dense indices.
        label: (N,) 1 = like, 0 = dislike or sampled negative.
    """

    user_idx: Tensor
    item_idx: Tensor
    label: Tensor

    @classmethod
    def from_columns(cls, columns: dict[str, NDArray[Any]]) -> Rows:
        """Take the columns of ``load_interactions``."""
        user, item, label = (torch.from_numpy(columns[name]) for name in ("user_idx", "item_idx", "label"))
        return cls(user, item, label.float())

    def to(self, device: torch.device) -> Rows:
        """Copy to a device."""
        return Rows(self.user_idx.to(device), self.item_idx.to(device), self.label.to(device))
