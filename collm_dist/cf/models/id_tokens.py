"""Id tokens: a row for each user and item that only stage 2 trains (the paper's UI-token ablation)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models.interface import TrainableCfModel


class IdTokens(TrainableCfModel):
    """Plain tables without training. Unknown users and items are zero, whatever the history."""

    trains_on_history: ClassVar[bool] = False

    def __init__(self, num_users: int, num_items: int, *, embedding_dim: int, history_length: int) -> None:
        """Build the tables; see the base class."""
        super().__init__(
            num_users, num_items, embedding_dim=embedding_dim, history_length=history_length, user_dim=embedding_dim
        )

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return the (C, E) rows of the table."""
        rows: Tensor = self.users(batch.user_idx)
        return rows[:, :-1]
