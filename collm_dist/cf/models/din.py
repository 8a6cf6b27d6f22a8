"""DIN (Zhou et al., "Deep interest network for click-through rate prediction", KDD 2018), with biases.

Shapes: C contexts, B targets, P pairs of a target and an item of its history, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.keyed_dropout import KeyedDropout
from collm_dist.cf.models.interface import TrainableCfModel


class Din(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + MLP(interest, item, interest * item).

    The interest is the user vector: the sum of the history's item vectors, each weighted by an MLP of it and the
    target (equation 3 of the paper; the weights are not normalized, so the sum keeps the strength of the interest). It
    depends on the target and is zero without history.
    """

    depends_on_target: ClassVar[bool] = True

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        embedding_dim: int,
        history_length: int,
        attention_sizes: Sequence[int],
        hidden_sizes: Sequence[int],
        dropout: float,
        seed: int = 0,
    ) -> None:
        """Build the layers.

        Args:
            num_users, num_items, embedding_dim, history_length: see the base class.
            attention_sizes: hidden widths of the attention MLP, at least one.
            hidden_sizes: hidden widths of the final MLP; empty = a linear layer.
            dropout: of the hidden layers of the final MLP.
            seed: of the layers' initial weights.
        """
        super().__init__(num_users, num_items, embedding_dim=embedding_dim, history_length=history_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # The first layer reads (item, target, item - target, item * target). It is linear, so its item and target
            # terms are computed once per item and target, and only the product term per pair.
            self.item_part = nn.Linear(embedding_dim, attention_sizes[0])
            self.target_part = nn.Linear(embedding_dim, attention_sizes[0], bias=False)
            self.product_part = nn.Linear(embedding_dim, attention_sizes[0], bias=False)
            self.attention = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([*attention_sizes, 1]))
            self.network = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([3 * embedding_dim, *hidden_sizes, 1]))
            self.slopes = nn.ModuleList(nn.PReLU(size) for size in hidden_sizes)
        self.dropouts = nn.ModuleList(KeyedDropout(dropout, site, size) for site, size in enumerate(hidden_sizes))

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return the (B, E) interests, one per target."""
        return self._attend(batch, self.items(batch.item_idx)[:, :-1])

    def _attend(self, batch: CfBatch, targets_BE: Tensor) -> Tensor:
        contexts, columns = (batch.history >= 0).nonzero(as_tuple=True)
        distinct, places = torch.unique(batch.history[contexts, columns], return_inverse=True)
        items = self.items(distinct)[:, :-1]  # an item of many histories is looked up and multiplied once
        counts = torch.bincount(contexts, minlength=len(batch.history))
        starts = counts.cumsum(0) - counts
        target_counts = counts[batch.target_contexts]
        targets = torch.arange(len(targets_BE), device=counts.device).repeat_interleave(target_counts)
        firsts = starts[batch.target_contexts] - (target_counts.cumsum(0) - target_counts)
        pairs = places[torch.arange(len(targets), device=counts.device) + firsts[targets]]
        # embedding() instead of indexing: its backward pass is much faster.
        items_PE = functional.embedding(pairs, items)
        states = functional.embedding(pairs, self.item_part(items))
        states = states + functional.embedding(targets, self.target_part(targets_BE))
        states = states + self.product_part(items_PE * functional.embedding(targets, targets_BE))
        for layer in self.attention:
            states = layer(torch.sigmoid(states))
        return torch.zeros_like(targets_BE).index_add(0, targets, items_PE * states)

    def match(self, users: Tensor, batch: CfBatch, items: Tensor) -> Tensor:
        """Return the (B,) outputs of the final MLP."""
        keys = None if batch.keys is None else (batch.keys[batch.target_contexts] + 7919 * batch.item_idx).abs()
        states = torch.cat([users, items, users * items], dim=1)
        *hidden, last = self.network
        for layer, slope, dropout in zip(hidden, self.slopes, self.dropouts, strict=True):
            states = dropout(slope(layer(states)), keys)
        logits: Tensor = last(states).squeeze(1)
        return logits
