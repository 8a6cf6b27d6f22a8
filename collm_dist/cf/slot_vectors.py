"""User and item vectors for the slots, from one CF model or from one per time fold.

With cross-fitting, the training rows are divided into folds by time. A row of fold k gets its vectors from a model
fitted to the folds before it; rows of fold 0 get zeros, the vectors of an unknown user and item. User vectors come from
the history at that time, never from a table that later rows have updated. So a row's slots never depend on its label.

Shapes: Q user queries, M items, H history items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models import TrainableCfModel


class SlotVectors(nn.Module):
    """Vectors as of a time. Without folds there is one model, and the time is ignored."""

    starts: Tensor

    def __init__(self, models: Sequence[TrainableCfModel], fold_starts: Sequence[int]) -> None:
        """Combine the models of all folds.

        Args:
            models: models of folds 1, 2, ...; the last one also serves later rows. Without folds, the only model.
            fold_starts: timestamps (seconds) at which folds 1, 2, ... begin; empty = no folds.
        """
        super().__init__()
        self.models = nn.ModuleList(models)
        self.fold_starts = tuple(fold_starts)
        self.register_buffer("starts", torch.tensor(self.fold_starts, dtype=torch.int64), persistent=False)

    @property
    def final(self) -> TrainableCfModel:
        """The model fitted to all training rows."""
        model = self.models[-1]
        assert isinstance(model, TrainableCfModel)
        return model

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return self.final.embedding_dim

    @property
    def depends_on_target(self) -> bool:
        """Whether user vectors depend on the target."""
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
        """(Q,), (Q, H), (Q,), (Q, F) -> (Q,) logits of the final model."""
        return self.final.score(user_idx, history, item_idx, features)

    def score_as_of(self, batch: CfBatch, timestamp: Tensor) -> tuple[Tensor, Tensor]:
        """Score targets with the model of the time fold that each belongs to, which has not seen the label.

        Users with a row in the model's table are known by it. Only the final model has such rows.

        Args:
            batch: C contexts with B targets.
            timestamp: (B,) seconds since 1970.

        Returns:
            (B,) logits, 0 in fold 0, and (B,) bool: whether a model has scored the target.
        """
        if not self.fold_starts:
            return self._score_batch(self.final, batch), torch.ones_like(timestamp, dtype=torch.bool)
        folds = torch.searchsorted(self.starts, timestamp, right=True)
        logits = torch.zeros(len(folds))
        for fold in torch.unique(folds[folds > 0]).tolist():
            targets = (folds == fold).nonzero().squeeze(1)
            contexts, owner = torch.unique(batch.target_contexts[targets], return_inverse=True)
            part = CfBatch(
                batch.user_idx[contexts],
                batch.history[contexts],
                owner,
                batch.item_idx[targets],
                features=None if batch.features is None else batch.features[targets],
            )
            model = self.models[fold - 1]
            assert isinstance(model, TrainableCfModel)
            logits[targets] = self._score_batch(model, part)
        return logits, folds > 0

    @staticmethod
    def _score_batch(model: TrainableCfModel, batch: CfBatch) -> Tensor:
        """Return the (B,) logits of a batch whose histories may be longer than the model's."""
        history = batch.history[:, max(batch.history.shape[1] - model.history_length, 0) :]
        logits: Tensor = model(dataclasses.replace(batch, history=history))
        return logits

    def _serve(self, method: str, timestamp: Tensor, *arguments: Tensor) -> Tensor:
        folds = torch.searchsorted(self.starts, timestamp, right=True)
        vectors = self.final.rotation.new_zeros(len(folds), self.embedding_dim)
        for fold in torch.unique(folds).tolist():
            if fold > 0:
                rows = (folds == fold).nonzero().squeeze(1)
                served = getattr(self.models[fold - 1], method)(*(argument[rows] for argument in arguments))
                vectors = vectors.index_put((rows,), served)
        return vectors
