"""Matrix factorization with biases (Koren et al., "Matrix factorization techniques for recommender systems", 2009).

Shapes: C contexts, H history items, E width of a vector.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models.interface import TrainableCfModel
from collm_dist.cf.weighted_sums import Occurrences


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

    @torch.no_grad()
    def backpropagate(
        self, batch: CfBatch, labels: Tensor, scale: float, weight_decay: float, bias_weight_decay: float
    ) -> Tensor:
        """Set the gradients in closed form: each row of a table is read once, and no (B, E) gradient is stored.

        The gradient of a user's vector is the sum of the items' vectors, weighted by the errors of the predictions.
        Text, statistics and subclasses use automatic differentiation.
        """
        if type(self) is not MatrixFactorization or self.items.text is not None or self.wide is not None:
            with torch.enable_grad():
                return super().backpropagate(batch, labels, scale, weight_decay, bias_weight_decay)
        users = Occurrences.find(batch.user_idx[batch.target_contexts])
        items = Occurrences.find(self.items.resolve(batch.item_idx))
        user_rows = self.users.weight.index_select(0, users.rows)  # several times as fast as indexing
        item_rows = self.items.weight.index_select(0, items.rows)
        # A bias is the last element; for the other side its place is 1, the derivative of the logit.
        users_with_one, items_with_one = (_end_with_one(rows) for rows in (user_rows, item_rows))
        products = users_with_one.index_select(0, users.places) * item_rows.index_select(0, items.places)
        logits = products.sum(dim=1) + self.global_bias + user_rows[users.places, -1]
        errors = (torch.sigmoid(logits) - labels) * scale
        user_gradients = users.sum_weighted(errors, items.places, items_with_one)
        item_gradients = items.sum_weighted(errors, users.places, users_with_one)
        decays = weight_decay * scale, bias_weight_decay * scale
        self.users.set_gradient(users, user_rows, user_gradients, *decays)
        self.items.set_gradient(items, item_rows, item_gradients, *decays)
        self.global_bias.grad = errors.sum()[None]
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")

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


def _end_with_one(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows[:, -1] = 1
    return rows
