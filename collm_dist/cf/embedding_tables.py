"""Embedding tables of users and items: a learned vector and bias per row, zero for unknown users.

Weight decay is a Gaussian prior around zero with inverse variance ``weight_decay``. An epoch minimizes the sum of the
rows' losses + weight_decay / 2 * the squared norm of each known user's and item's vector, counted once; biases have
their own prior, ``bias_weight_decay``. A table row that occurs n times in an epoch contributes 1/n of its penalty each
time. So heavy users are not penalized more than light ones, and no row decays in batches that do not contain it. In
expectation this equals Adam's L2 penalty with the coefficient weight_decay / number of training rows.

Shapes: U users owned, I items, E width of a vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.cf.item_text import ItemText
from collm_dist.cf.weighted_sums import Occurrences
from collm_dist.random_keys import hash_integers, to_unit_interval

_INIT_ROWS = 1 << 14
_TINY = 2.0**-54  # the inverse normal CDF is infinite at zero


class EmbeddingTable(nn.Module):
    """Table of R learned rows: a vector and, last, a bias. A step updates only the rows that its batch contains.

    Attributes:
        weight: (R, E + 1).
        known: (R,) whether the training rows contain the user or item.
        share: (R,) one over the number of training rows that contain it.
        sparse: whether gradients are sparse.
    """

    known: Tensor
    share: Tensor

    def __init__(self, num_rows: int, dim: int, *, sparse: bool = True) -> None:
        """Build R rows of zeros."""
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.zeros(num_rows, dim + 1))
        self.register_buffer("known", torch.zeros(num_rows, dtype=torch.bool))
        self.register_buffer("share", torch.ones(num_rows), persistent=False)

    @torch.no_grad()
    def init_weights(self, counts: Tensor, numbers: Tensor, scale: float, seed: int) -> None:
        """Draw the vectors of the known rows; biases start at zero.

        Zero vectors would be a saddle point. Each row is drawn from its global number, so the draws do not depend on
        the number of workers.

        Args:
            counts: (R,) training rows that contain each row; 0 = unknown.
            numbers: (R,) number of each row in the whole table.
            scale: standard deviation.
            seed: of the draws.
        """
        self.known.copy_(counts > 0)
        self.share.copy_(1 / counts.clamp(min=1))
        columns = np.arange(self.weight.shape[1] - 1)
        for first in range(0, len(counts), _INIT_ROWS):
            rows = slice(first, first + _INIT_ROWS)
            uniform = to_unit_interval(hash_integers(seed, numbers[rows].numpy()[:, None], columns)) + _TINY
            vectors = torch.special.ndtri(torch.from_numpy(uniform)).float() * scale
            self.weight[rows, :-1] = torch.where(self.known[rows, None], vectors, 0.0)

    def penalty(self, index: Tensor, weight_decay: float, bias_weight_decay: float) -> Tensor:
        """(B,) known rows -> (): half their weighted squares, each divided by its number of training rows."""
        squares = functional.embedding(index, self.weight, sparse=self.sparse).square()
        weighted = weight_decay * squares[:, :-1].sum(dim=-1) + bias_weight_decay * squares[:, -1]
        return weighted @ self.share[index] / 2

    def set_gradient(
        self, found: Occurrences, rows: Tensor, gradients: Tensor, weight_decay: float, bias_weight_decay: float
    ) -> None:
        """Set the sparse gradient of a batch's loss and penalty.

        Args:
            found: R distinct rows of the table that the batch refers to.
            rows: (R, E + 1) their weights.
            gradients: (R, E + 1) of the loss. Changed in place.
            weight_decay, bias_weight_decay: see ``penalty``.
        """
        decays = rows.new_full((rows.shape[1],), weight_decay)
        decays[-1] = bias_weight_decay
        gradients.addcmul_(rows * decays, (found.counts * self.share[found.rows])[:, None])
        self.weight.grad = torch.sparse_coo_tensor(
            found.rows[None], gradients, self.weight.shape, is_coalesced=True, check_invariants=False
        )


class UserTable(EmbeddingTable):
    """Rows of the users that a worker owns. The row of an unknown user is zero, the mean of the prior."""

    def is_known(self, index: Tensor) -> Tensor:
        """(B,) -> (B,) bool; -1 and indices beyond the table are unknown."""
        if len(self.known) == 0:
            return torch.zeros_like(index, dtype=torch.bool)
        inside = (index >= 0) & (index < len(self.known))
        return inside & self.known[index.clamp(0, len(self.known) - 1)]

    def forward(self, index: Tensor) -> Tensor:
        """(B,) -> (B, E + 1)."""
        if len(self.known) == 0:
            return self.weight.new_zeros(len(index), self.weight.shape[1])
        rows = functional.embedding(index.clamp(0, len(self.known) - 1), self.weight, sparse=self.sparse)
        return rows * self.is_known(index)[:, None]

    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Set weight and buffers without copying, with any number of rows: a memory map stays one."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor) if name == "weight" else tensor)


class ItemTable(EmbeddingTable):
    """Rows of all items, replicated on all workers. The last row stands for all items without training rows.

    Attributes:
        text: contribution of the item texts to the rows (``cf.item_text``); None = no texts.
    """

    text: ItemText | None

    def __init__(self, num_items: int, dim: int, *, sparse: bool = True) -> None:
        """Build I + 1 rows of zeros."""
        super().__init__(num_items + 1, dim, sparse=sparse)
        self.text = None

    def add_text(self, vectors: Tensor, num_rows: int = 1) -> None:
        """Add the contribution of (I, K) text vectors to the rows; see ``ItemText``."""
        self.text = ItemText(vectors, self.weight.shape[1] - 1, num_rows)

    @torch.no_grad()
    def init_weights(self, counts: Tensor, numbers: Tensor, scale: float, seed: int) -> None:
        """Draw as for any table, but start the unknown item at zero: it may occur too rarely to unlearn a draw."""
        super().init_weights(counts, numbers, scale, seed)
        self.weight[self.unknown] = 0

    @property
    def unknown(self) -> int:
        """Row of unknown items: I."""
        return len(self.known) - 1

    def resolve(self, index: Tensor) -> Tensor:
        """Return the rows of items, in any shape."""
        inside = (index >= 0) & (index < self.unknown)
        clamped = index.clamp(0, self.unknown)
        return torch.where(inside & self.known[clamped], clamped, self.unknown)

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., E + 1)."""
        rows = functional.embedding(self.resolve(index), self.weight, sparse=self.sparse)
        return rows if self.text is None else rows + self.text(index)

    def compute_all(self) -> Tensor:
        """Return (I + 1, E + 1) rows; with texts, each item without training rows has its own."""
        if self.text is None:
            return self.weight
        rows: Tensor = self(torch.arange(len(self.known), device=self.weight.device))
        return rows

    def locate(self, index: Tensor) -> Tensor:
        """Return the positions of items in ``compute_all``, in any shape."""
        if self.text is None:
            return self.resolve(index)
        return torch.where((index >= 0) & (index < self.unknown), index, self.unknown)
