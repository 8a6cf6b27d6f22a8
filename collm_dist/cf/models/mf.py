"""Matrix factorization with biases (Koren et al., "Matrix factorization techniques for recommender systems", 2009).

Shapes: C contexts, H history items, E width of a vector.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models.interface import TrainableCfModel


class MatrixFactorization(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + <user vector, item vector>.

    An unknown user is folded in from the history: the most probable vector under the model's prior and likelihood,
    given that every item of the history was liked, by one Newton step from the prior's mean.
    """

    trains_on_history: ClassVar[bool] = False

    def __init__(
        self, num_users: int, num_items: int, *, embedding_dim: int, history_length: int, prior_precision: float
    ) -> None:
        """Build the tables.

        Args:
            num_users, num_items, embedding_dim, history_length: see the base class.
            prior_precision: inverse variance of the prior on a user's vector, ``cf.weight_decay``.
        """
        super().__init__(
            num_users, num_items, embedding_dim=embedding_dim, history_length=history_length, user_dim=embedding_dim
        )
        self.prior_precision = prior_precision

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return (C, E): rows of the table, or vectors folded in from the history for unknown users."""
        vectors: Tensor = self.users(batch.user_idx)[:, :-1]
        unknown = ~self.users.is_known(batch.user_idx) & (batch.history >= 0).any(dim=1)
        if self.training or not unknown.any():
            return vectors
        return vectors.index_put((unknown,), self._fold_in(batch.history[unknown]))

    def _fold_in(self, history_CH: Tensor) -> Tensor:
        """(C, H) -> (C, E): (Q'WQ + lambda)^-1 Q'(1 - p) = Q'(W QQ' + lambda)^-1 (1 - p), a system in H unknowns."""
        rows = self.items(history_CH).float()  # in stage 2 the tables may be in bfloat16, which solve does not support
        is_item = history_CH >= 0
        items_CHE: Tensor = rows[..., :-1] * is_item[..., None]
        likely = torch.sigmoid(self.global_bias + rows[..., -1])
        gram = (likely * (1 - likely))[..., None] * (items_CHE @ items_CHE.mT)
        precision = max(self.prior_precision, 1e-3)  # zero would make the system singular
        system = gram + precision * torch.eye(gram.shape[-1], device=gram.device)
        weights: Tensor = torch.linalg.solve(system, ((1 - likely) * is_item)[..., None])
        return (items_CHE.mT @ weights).squeeze(-1).to(self.items.weight.dtype)
