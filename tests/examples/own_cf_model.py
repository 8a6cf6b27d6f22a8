"""Custom CF model: a user is the mean of the liked items, weighted by recency.

    PYTHONPATH=. python launch/pretrain_cf.py --config C cf.model=tests.examples.own_cf_model:RecentLikes \
        'cf.arguments={half_life: 5}'

The base class provides tables, biases, training, checkpoints, cross-fitting and export.
"""

import torch
from torch import Tensor

from collm_dist.cf.models import CfBatch, TrainableCfModel


class RecentLikes(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + <weighted mean of the liked items' vectors, item vector>."""

    def __init__(
        self, num_users: int, num_items: int, *, embedding_dim: int, history_length: int, half_life: float
    ) -> None:
        """half_life: number of likes after which an item's weight is halved."""
        super().__init__(num_users, num_items, embedding_dim=embedding_dim, history_length=history_length)
        self.half_life = half_life

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """(C, H) histories, newest last, -1 = padding -> (C, E)."""
        age = torch.arange(batch.history.shape[1] - 1, -1, -1, device=batch.history.device)
        weights = 0.5 ** (age / self.half_life) * (batch.history >= 0)
        total = (weights[..., None] * self.history_vectors(batch.history)).sum(dim=1)
        return total / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
