"""Matrix factorization with biases (Koren et al., "Matrix factorization techniques for recommender systems", 2009).

Shapes: U users, I items, B pairs, M items asked for, E width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# The penalty on a bias, relative to that on a number of a vector: on ML-1M between .05 and .2 nothing changes.
BIAS_PENALTY = 0.1


class MatrixFactorization(nn.Module):
    """logit(like) = global bias + user bias + item bias + <user vector, item vector>.

    Weight decay is a Gaussian prior around zero, with ``weight_decay`` as its inverse variance: a pass through the
    training rows minimizes the sum of their losses + weight_decay / 2 * the squares of every known user's and item's
    vector, once each (biases count a tenth: they are few and their prior is wide). A row of the tables that a pass
    meets n times carries 1/n of its share each time. So heavy users are not held down more than light ones, no row
    decays in batches that do not meet it, and unknown rows stay zero, which is what the prior says about them. In
    expectation it is Adam's own L2 penalty with a coefficient of weight_decay / number of training rows.
    """

    user_share: Tensor
    item_share: Tensor
    user_scale: Tensor
    item_scale: Tensor
    name = "mf"
    depends_on_target = False

    def __init__(
        self, user_rows: Tensor, item_rows: Tensor, *, embedding_dim: int, init_scale: float = 0.1, seed: int = 0
    ) -> None:
        """Make the tables.

        Args:
            user_rows: (U,) training rows of each user; 0 = unknown.
            item_rows: (I,) training rows of each item.
            embedding_dim: E.
            init_scale: standard deviation of the vectors. The biases start at zero and learn at once, so the vectors
                never have to find the way out of a saddle point by themselves.
            seed: of the initial vectors.
        """
        super().__init__()
        self.embedding_dim = embedding_dim
        generator = torch.Generator().manual_seed(seed)
        for name, rows in (("user", user_rows), ("item", item_rows)):
            vectors = torch.randn(len(rows), embedding_dim, generator=generator) * init_scale
            vectors[rows == 0] = 0
            setattr(self, f"{name}_table", nn.Parameter(vectors))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(len(rows), 1)))
            self.register_buffer(f"{name}_share", 1 / rows.clamp(min=1).float(), persistent=False)
            self.register_buffer(f"{name}_scale", torch.ones(()))
        self.global_bias = nn.Parameter(torch.zeros(1))  # not (): DeepSpeed cannot broadcast a parameter without axes

    user_table: nn.Parameter
    item_table: nn.Parameter
    user_bias: nn.Parameter
    item_bias: nn.Parameter

    @property
    def arguments(self) -> dict[str, int]:
        """What the class is built with again, beside the numbers of users and items."""
        return {"embedding_dim": self.embedding_dim}

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor) -> Tensor:
        """(B,) -> (B, E) unit-scaled; history and target are not read."""
        return _look_up(self.user_table, user_idx) * self.user_scale

    def item_vectors(self, item_idx: Tensor) -> Tensor:
        """(M,) -> (M, E) unit-scaled."""
        return _look_up(self.item_table, item_idx) * self.item_scale

    def score(self, user_idx: Tensor, history: Tensor, item_idx: Tensor) -> Tensor:
        """(B,), ignored, (B,) -> (B,) logits."""
        products = (_look_up(self.user_table, user_idx) * _look_up(self.item_table, item_idx)).sum(dim=-1)
        biases = _look_up(self.user_bias, user_idx) + _look_up(self.item_bias, item_idx)
        return self.global_bias + biases.squeeze(-1) + products

    def compute_penalty(self, user_idx: Tensor, item_idx: Tensor) -> Tensor:
        """(B,), (B,) -> (): half the squares of the pairs' rows, each divided by how often a pass meets it."""
        users = _sum_squares(self.user_table, user_idx) + BIAS_PENALTY * _sum_squares(self.user_bias, user_idx)
        items = _sum_squares(self.item_table, item_idx) + BIAS_PENALTY * _sum_squares(self.item_bias, item_idx)
        return (users @ self.user_share[user_idx] + items @ self.item_share[item_idx]) / 2

    @torch.no_grad()
    def fix_scales(self) -> None:
        """Set the factors such that the root mean square norm of the known rows is 1 (tables of zeros keep theirs)."""
        for table, scale in ((self.user_table, self.user_scale), (self.item_table, self.item_scale)):
            squares = table.square().sum(dim=1)
            known = squares[squares > 0]
            scale.fill_(known.mean().rsqrt() if len(known) else 1.0)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return the rows of a table, zeros for an index outside it."""
    if len(table) == 0:
        return table.new_zeros(*index.shape, table.shape[1])
    inside = (index >= 0) & (index < len(table))
    return functional.embedding(index.clamp(0, len(table) - 1), table) * inside.unsqueeze(-1)


def _sum_squares(table: Tensor, index: Tensor) -> Tensor:
    return functional.embedding(index, table).square().sum(dim=-1)
