"""What every collaborative-filtering model offers, whatever is inside.

Shapes: B pairs, M items, H history items (left-padded with -1), E width of a vector.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class CfModel(Protocol):
    """A module that scores pairs and hands vectors to the language model.

    Index -1, an index beyond the tables, and a user or item without training rows are unknown: their vector is zero
    and so is their bias, which is the mean of the prior that the penalty is. No score comes from random numbers.

    The vectors are unit-scaled: multiplied by one factor for users and one for items, such that the root mean square
    of the norms of the known rows is 1. Directions and relative lengths stay, and a mapping sees inputs of one size
    whatever model and width made them. ``score`` uses the vectors as they were trained.
    """

    embedding_dim: int
    depends_on_target: bool

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor) -> Tensor:
        """(B,), (B, H), (B,) -> (B, E). Target is read only where ``depends_on_target``."""
        ...

    def item_vectors(self, item_idx: Tensor) -> Tensor:
        """(M,) -> (M, E)."""
        ...

    def score(self, user_idx: Tensor, history: Tensor, item_idx: Tensor) -> Tensor:
        """(B,), (B, H), (B,) -> (B,) logits of a like, biases included."""
        ...


class TrainableCfModel(CfModel, Protocol):
    """What trainer and export need beside that; the class is also a torch module.

    Attributes:
        name: value of ``cf.model``.
        arguments: keyword arguments, plain JSON, that the class is built with beside the numbers of users and items.
    """

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """See the class."""
        ...

    def compute_penalty(self, user_idx: Tensor, item_idx: Tensor) -> Tensor:
        """(B,), (B,) -> (): the pairs' share of the sum of squares that weight decay keeps small."""
        ...

    def fix_scales(self) -> None:
        """Set the factors of the unit-scaled vectors, once training is over."""
        ...
