"""The rows that a model keeps for each user and item: a vector and a bias, learned, and zero where nothing is known.

Weight decay is a Gaussian prior around zero with ``weight_decay`` as its inverse variance: a pass through the training
rows minimizes the sum of their losses + weight_decay / 2 * the squares of every known user's and item's vector, once
each; biases have a prior of their own, ``bias_weight_decay``. A row of a table that a pass meets n times carries
1/n of its share each time. So heavy users are not held down more than light ones, and no row decays in batches that do
not meet it. In expectation it is Adam's own L2 penalty with a coefficient of weight_decay / number of training rows.

Shapes: U users owned, I items, E width of a vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.random_keys import hash_integers, to_unit_interval

_INIT_ROWS = 1 << 14
_TINY = 2.0**-54  # the inverse of the normal distribution is infinite at zero


class Table(nn.Module):
    """Learned rows of E + 1 numbers, the last one the bias; only rows that a batch meets take part in its step.

    Attributes:
        weight: (R, E + 1).
        known: (R,) whether the training rows hold it.
        share: (R,) one over how many training rows hold it.
        sparse: whether gradients are sparse.
    """

    known: Tensor
    share: Tensor

    def __init__(self, num_rows: int, dim: int, *, sparse: bool = True) -> None:
        """Make R rows of zeros."""
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.zeros(num_rows, dim + 1))
        self.register_buffer("known", torch.zeros(num_rows, dtype=torch.bool))
        self.register_buffer("share", torch.ones(num_rows), persistent=False)

    @torch.no_grad()
    def init_weights(self, counts: Tensor, numbers: Tensor, scale: float, seed: int) -> None:
        """Draw the vectors of the known rows; biases start at zero and learn at once.

        So the vectors never have to find the way out of a saddle point by themselves. Each row is drawn from its own
        number, whoever holds it.

        Args:
            counts: (R,) training rows that hold each row; 0 = unknown.
            numbers: (R,) the row's number in the whole table.
            scale: standard deviation.
            seed: of the draw.
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
        """(B,) known rows -> (): half their weighted squares, each divided by how often a pass meets it."""
        squares = functional.embedding(index, self.weight, sparse=self.sparse).square()
        weighted = weight_decay * squares[:, :-1].sum(dim=-1) + bias_weight_decay * squares[:, -1]
        return weighted @ self.share[index] / 2


class UserTable(Table):
    """Rows of the users that a worker owns. An unknown user's is zero, the mean of the prior."""

    def is_known(self, index: Tensor) -> Tensor:
        """(B,) -> (B,) bool; -1 and what is beyond the table are unknown."""
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

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Take weight and buffers as they are, however many rows they have: a view of a file stays one."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor) if name == "weight" else tensor)


class ItemTable(Table):
    """Rows of all items, the same on every worker. The last row stands for every item that training has not met."""

    def __init__(self, num_items: int, dim: int, *, sparse: bool = True) -> None:
        """Make I + 1 rows of zeros."""
        super().__init__(num_items + 1, dim, sparse=sparse)

    @torch.no_grad()
    def init_weights(self, counts: Tensor, numbers: Tensor, scale: float, seed: int) -> None:
        """As for every table, but the unknown item starts at zero: it may be met too seldom to forget a draw."""
        super().init_weights(counts, numbers, scale, seed)
        self.weight[self.unknown] = 0

    @property
    def unknown(self) -> int:
        """I, the row of unknown items."""
        return len(self.known) - 1

    def resolve(self, index: Tensor) -> Tensor:
        """Map items to rows; any shape."""
        inside = (index >= 0) & (index < self.unknown)
        clamped = index.clamp(0, self.unknown)
        return torch.where(inside & self.known[clamped], clamped, self.unknown)

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., E + 1)."""
        return functional.embedding(self.resolve(index), self.weight, sparse=self.sparse)
