"""LightGCN (He et al., "LightGCN: simplifying and powering graph convolution network", SIGIR 2020), with biases.

User rows live on one worker, item rows on all: a layer is a local update of the owned users and one all-reduce of the
sums for the items.

Shapes: U users owned, I items, C contexts, B targets, E width of a vector, K layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from collm_dist.cf.batches import CfBatch, Rows
from collm_dist.cf.models.interface import TrainableCfModel
from collm_dist.cf.weighted_sums import CompressedRows
from collm_dist.distributed import get_world_size, sum_over_workers


class _Smooth(torch.autograd.Function):
    """Smoothing over the graph. It is linear and symmetric, so the backward pass smooths the gradients."""

    @staticmethod
    def forward(ctx: Any, model: LightGcn, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.model = model
        users, items, below = model.smooth(users, items)
        ctx.mark_non_differentiable(below)
        return users, items, below

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        # Each worker has the gradients of its own rows' losses. Its share of the result is what sums to the whole.
        users, items, _ = ctx.model.smooth(gradients[0], sum_over_workers(gradients[1].clone()))
        return None, users, items / get_world_size()


class LightGcn(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + <user vector, item vector>, vectors smoothed over the graph.

    The graph connects each user with all items of the user's training rows, liked or not: edges for likes only would
    reveal the label of the row that is trained on. A layer replaces a vector by the sum of its neighbors', divided by
    the square roots of both ends' degrees; the vector used for scoring is the mean over layers 0..K (equations 7 and 8
    of the paper). An unknown user starts from zero and receives messages from the items of the history.
    """

    trains_on_history: ClassVar[bool] = False
    supports_tuning: ClassVar[bool] = False
    smoothed_items: Tensor
    folding_items: Tensor

    def __init__(
        self, num_users: int, num_items: int, *, embedding_dim: int, history_length: int, num_layers: int
    ) -> None:
        """Build the tables; ``num_layers`` is K, for the others see the base class."""
        super().__init__(
            num_users,
            num_items,
            embedding_dim=embedding_dim,
            history_length=history_length,
            user_dim=embedding_dim,
            sparse=False,  # through the graph, every row takes part in every step
        )
        self.num_layers = num_layers
        self.users.register_buffer("smoothed", torch.zeros(num_users, embedding_dim))
        self.register_buffer("smoothed_items", torch.zeros(num_items + 1, embedding_dim))
        self.register_buffer("folding_items", torch.zeros(num_items + 1, embedding_dim))

    def prepare(self, train: Rows) -> None:
        """Build the graph of the owned users' distinct (user, item) pairs."""
        shape = (len(self.users.known), len(self.items.known))
        pairs = torch.unique(train.row_users.long() * shape[1] + self.items.resolve(train.item_idx.long()))
        users, items = pairs // shape[1], pairs % shape[1]
        user_degrees = torch.bincount(users, minlength=shape[0]).float()
        self.item_degrees = sum_over_workers(torch.bincount(items, minlength=shape[1]).float())
        values = (user_degrees[users] * self.item_degrees[items]).rsqrt()
        self.graph = CompressedRows.from_sorted(users, items, values, shape[0])
        order = items.argsort(stable=True)
        self.transposed = CompressedRows.from_sorted(items[order], users[order], values[order], shape[1])

    def propagate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the results of ``smooth`` for the tables; gradients flow back to them."""
        tables = self.users.weight[:, :-1], self.items.compute_all()[:, :-1]
        smoothed: tuple[Tensor, Tensor, Tensor] = _Smooth.apply(self, *tables)  # type: ignore[no-untyped-call]
        return smoothed

    @torch.no_grad()
    def smooth(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U, E), (I + 1, E) -> their smoothed vectors, and (I + 1, E) sums of the item layers below the last."""
        user_sum, item_sum, below = users, items, torch.zeros_like(items)
        for _ in range(self.num_layers):
            users, items = self.graph @ items, sum_over_workers(self.transposed @ users)
            below = item_sum
            user_sum, item_sum = user_sum + users, item_sum + items
        count = self.num_layers + 1
        return user_sum / count, item_sum / count, below / count

    def forward(self, batch: CfBatch) -> Tensor:
        """Return the (B,) logits of a batch's targets; training propagates the whole graph for each batch."""
        if not self.training:
            return super().forward(batch)
        users, items, _ = self.propagate()
        # embedding() instead of indexing: its backward pass is much faster.
        user_rows = functional.embedding(batch.user_idx, users)
        item_rows = functional.embedding(self.items.locate(batch.item_idx), items)
        own_rows = self.items(batch.item_idx)
        if self.items.text is not None:
            # Masked items have no place in the graph. Like an unseen item they receive nothing from it, so the mean
            # over the layers is a fraction of their own row: the unknown item's and the text's contribution.
            is_masked = batch.item_idx < -1
            item_rows = torch.where(is_masked[:, None], own_rows[:, :-1] / (self.num_layers + 1), item_rows)
        matched = self.match(user_rows, batch, item_rows)
        biases = self.user_biases(batch)[batch.target_contexts] + own_rows[:, -1]
        logits: Tensor = self.global_bias + biases + matched + self.feature_logits(batch)
        return logits

    @torch.no_grad()
    def refresh(self) -> None:
        """Propagate once and cache the result for scoring."""
        users, items, below = self.propagate()
        self.users.get_buffer("smoothed").copy_(users)
        self.smoothed_items.copy_(items)
        self.folding_items.copy_(below * self.item_degrees.clamp(min=1).rsqrt()[:, None])

    def item_rows(self, item_idx: Tensor) -> Tensor:
        """(...) -> (..., E + 1): smoothed vector and bias."""
        rows = self.items.locate(item_idx)
        return torch.cat([self.smoothed_items[rows], self.items(item_idx)[..., -1:]], dim=-1)

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return (C, E): smoothed rows, or the messages of the history's items for unknown users."""
        known = self.users.is_known(batch.user_idx)
        is_item = batch.history >= 0
        sent = self.folding_items[self.items.locate(batch.history)] * is_item[..., None]
        folded: Tensor = sent.sum(dim=1) * is_item.sum(dim=1, keepdim=True).clamp(min=1).rsqrt()
        if not known.any():
            return folded
        smoothed = self.users.get_buffer("smoothed")
        return torch.where(known[:, None], smoothed[batch.user_idx.clamp(0, len(smoothed) - 1)], folded)
