"""LightGCN (He et al., "LightGCN: simplifying and powering graph convolution network", SIGIR 2020), with biases.

User rows live on one worker, item rows on all: a layer is a local update of the owned users and one all-reduce of the
sums for the items.

Shapes: U users owned, I items, C contexts, B targets, E width of a vector, K layers.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from collm_dist.cf.batches import CfBatch, Rows
from collm_dist.cf.models.interface import TrainableCfModel
from collm_dist.distributed import sum_differentiably, sum_over_workers


class _SparseMatmul(torch.autograd.Function):
    """Sparse-dense matmul whose backward pass uses a precomputed transpose."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transposed @ gradients[0].contiguous()


def _build_csr(rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # PyTorch warns that CSR support is in beta; the matmul used here has been stable for years.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_coo_tensor(torch.stack([rows, cols]), values, shape, check_invariants=False).to_sparse_csr()


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
        self.graph = _build_csr(users, items, values, shape)
        self.transposed = _build_csr(items, users, values, shape[::-1])

    def propagate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (U, E) and (I + 1, E) smoothed vectors, and (I + 1, E) sums of the item layers below the last."""
        users, items = self.users.weight[:, :-1], self.items.compute_all()[:, :-1]
        user_sum, item_sum, below = users, items, torch.zeros_like(items)
        for _ in range(self.num_layers):
            below = below + items
            users, items = (
                _SparseMatmul.apply(self.graph, self.transposed, items),  # type: ignore[no-untyped-call]
                sum_differentiably(_SparseMatmul.apply(self.transposed, self.graph, users)),  # type: ignore[no-untyped-call]
            )
            user_sum, item_sum = user_sum + users, item_sum + items
        count = self.num_layers + 1
        return user_sum / count, item_sum / count, below / count

    def forward(self, batch: CfBatch) -> Tensor:
        """Return the (B,) logits of a batch's targets; training propagates the whole graph for each batch."""
        if not self.training:
            return super().forward(batch)
        users, items, _ = self.propagate()
        rows = self.items.locate(batch.item_idx)
        matched = self.match(users[batch.user_idx], batch, items[rows])
        biases = self.user_biases(batch)[batch.target_contexts] + self.items(batch.item_idx)[:, -1]
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
