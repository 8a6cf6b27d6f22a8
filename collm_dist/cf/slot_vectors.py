"""What the slots read: the vectors of one collaborative model, or of one for each time fold.

With cross-fitting the training rows are cut by time into folds. A row of fold k is served by a model that was fitted to
the folds before it; fold 0 by none, so its vectors are zero, which is the unknown user and item. User vectors come from
the history at that moment, never from a table that later rows have shaped. So nothing that a row's slots carry has seen
that row's label.

Shapes: Q user queries, M items, H history items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from collm_dist.cf.models import TrainableCfModel


class SlotVectors(nn.Module):
    """Vectors as of a time. Without folds there is one model, and the time does not matter."""

    starts: Tensor

    def __init__(self, models: Sequence[TrainableCfModel], fold_starts: Sequence[int]) -> None:
        """Take the models.

        Args:
            models: with folds, those of fold 1, 2, ..., the last of which also serves whatever comes later.
            fold_starts: timestamps (seconds) at which fold 1, 2, ... begin; none = no folds, and one model.
        """
        super().__init__()
        self.models = nn.ModuleList(models)
        self.fold_starts = tuple(fold_starts)
        self.register_buffer("starts", torch.tensor(self.fold_starts, dtype=torch.int64), persistent=False)

    @property
    def final(self) -> TrainableCfModel:
        """The model of all training rows."""
        model = self.models[-1]
        assert isinstance(model, TrainableCfModel)
        return model

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return self.final.embedding_dim

    @property
    def depends_on_target(self) -> bool:
        """Whether a user's vector reads the target."""
        return self.final.depends_on_target

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor, timestamp: Tensor) -> Tensor:
        """(Q,), (Q, H), (Q,), (Q,) seconds -> (Q, embedding_dim)."""
        if not self.fold_starts:
            return self.final.user_vectors(user_idx, history, target)
        return self._serve("user_vectors", timestamp, torch.full_like(user_idx, -1), history, target)

    def item_vectors(self, item_idx: Tensor, timestamp: Tensor) -> Tensor:
        """(M,), (M,) seconds -> (M, embedding_dim)."""
        if not self.fold_starts:
            return self.final.item_vectors(item_idx)
        return self._serve("item_vectors", timestamp, item_idx)

    def score(self, user_idx: Tensor, history: Tensor, item_idx: Tensor, features: Tensor | None = None) -> Tensor:
        """(Q,), (Q, H), (Q,), (Q, F) -> (Q,) logits of the model of all training rows."""
        return self.final.score(user_idx, history, item_idx, features)

    def _serve(self, method: str, timestamp: Tensor, *arguments: Tensor) -> Tensor:
        folds = torch.searchsorted(self.starts, timestamp, right=True)
        vectors = self.final.rotation.new_zeros(len(folds), self.embedding_dim)
        for fold in torch.unique(folds).tolist():
            if fold > 0:
                rows = (folds == fold).nonzero().squeeze(1)
                found = getattr(self.models[fold - 1], method)(*(one[rows] for one in arguments))
                vectors = vectors.index_put((rows,), found)
        return vectors
