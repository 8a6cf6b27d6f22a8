"""SASRec (Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018), trained pointwise as in CoLLM.

Shapes: C contexts, H history items, E width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.keyed_dropout import KeyedDropout
from collm_dist.cf.models.interface import TrainableCfModel

# Contexts are grouped by length, each group up to this share of the longest history: padding costs as much as items.
_LENGTH_SHARES = (0.25, 0.5, 0.75, 1.0)


class _Block(nn.Module):
    """One layer: causal self-attention, then a position-wise MLP, each with a residual connection."""

    def __init__(self, dim: int, num_heads: int, dropout: float, site: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.network_norm = nn.LayerNorm(dim, eps=1e-8), nn.LayerNorm(dim, eps=1e-8)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner_dropout = KeyedDropout(dropout, site, width)
        self.outer_dropout = KeyedDropout(dropout, site + 1, width)

    def forward(self, states_CHE: Tensor, mask_CHH: Tensor, keys: Tensor | None, *, last_only: bool) -> Tensor:
        """(C, H, E) -> (C, H, E), or (C, 1, E) with ``last_only``."""
        positions = slice(-1, None) if last_only else slice(None)
        normed = self.attention_norm(states_CHE[:, positions])
        attended = functional.scaled_dot_product_attention(
            self._split(self.query(normed)),
            self._split(self.key(states_CHE)),
            self._split(self.value(states_CHE)),
            attn_mask=mask_CHH[:, None, positions],
        )
        states = self.network_norm(normed + attended.transpose(1, 2).flatten(2))
        inner = self.inner_dropout(torch.relu(self.inner(states)), keys, from_end=True)
        output: Tensor = states + self.outer_dropout(self.outer(inner), keys, from_end=True)
        return output

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.num_heads, -1).transpose(1, 2)


class SasRec(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + <state after the history, item vector>.

    Positions are counted from the end of the history, so cutting a history does not shift them. The last layer is
    computed at the last position only, the only one that is read. A user without history has a learned vector. The
    authors train on the next item against a sampled one; CoLLM and this class train on the labels.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        embedding_dim: int,
        history_length: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        seed: int = 0,
    ) -> None:
        """Build the layers.

        Args:
            num_users, num_items, embedding_dim, history_length: see the base class.
            num_layers, num_heads: of self-attention; E is divisible by ``num_heads``.
            dropout: of the embeddings and of both MLP layers.
            seed: of the layers' initial weights.
        """
        super().__init__(num_users, num_items, embedding_dim=embedding_dim, history_length=history_length)
        width = history_length * embedding_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.positions = nn.Parameter(torch.randn(history_length, embedding_dim) * 0.02)
            self.nobody = nn.Parameter(torch.zeros(embedding_dim))
            self.blocks = nn.ModuleList(
                _Block(embedding_dim, num_heads, dropout, 1 + 2 * layer, width) for layer in range(num_layers)
            )
            self.final_norm = nn.LayerNorm(embedding_dim, eps=1e-8)
        self.embedding_dropout = KeyedDropout(dropout, 0, width)

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return the (C, E) states after the histories."""
        lengths = (batch.history >= 0).sum(dim=1)
        vectors, order, longest = [], [], batch.history.shape[1]
        shortest = 0
        for share in _LENGTH_SHARES:
            width = round(longest * share)
            group = ((lengths > shortest) & (lengths <= width)).nonzero().squeeze(1)
            shortest = max(shortest, width)
            if len(group):
                keys = None if batch.keys is None else batch.keys[group]
                vectors.append(self._encode(batch.history[group, longest - width :], keys))
                order.append(group)
        empty = (lengths == 0).nonzero().squeeze(1)
        vectors.append(self.nobody.expand(len(empty), -1))
        positions = torch.cat([*order, empty]).argsort()
        return torch.cat(vectors)[positions]

    def _encode(self, history_CH: Tensor, keys: Tensor | None) -> Tensor:
        """(C, H) with at least one item per row -> (C, E), the state at the last position."""
        width = history_CH.shape[1]
        is_item = history_CH >= 0
        embedded = self.history_vectors(history_CH) * self.dim**0.5 + self.positions[len(self.positions) - width :]
        states = self.embedding_dropout(embedded, keys, from_end=True) * is_item[..., None]
        causal = torch.ones(width, width, dtype=torch.bool, device=history_CH.device).tril()
        # Padding attends to itself, so that no softmax row is empty; items do not attend to padding.
        mask = causal & (is_item[:, None, :] | torch.eye(width, dtype=torch.bool, device=history_CH.device))
        for number, block in enumerate(self.blocks):
            states = block(states, mask, keys, last_only=number == len(self.blocks) - 1)
        vectors: Tensor = self.final_norm(states[:, -1])
        return vectors
