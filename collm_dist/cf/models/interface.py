"""What every collaborative-filtering model offers, whatever is inside.

Shapes: B pairs (targets), C contexts, M items, H history items (right-aligned, -1 = padding), E width of the model's
own vectors, E + 1 that of the exported ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.cf.batches import CfBatch, Rows
from collm_dist.cf.embedding_tables import ItemTable, UserTable
from collm_dist.data.samples.statistics import PAIR_FEATURES


@runtime_checkable
class CfModel(Protocol):
    """A module that scores pairs and hands vectors to the language model.

    Index -1, an index beyond the tables, and a user or item without training rows are unknown. An unknown user's
    vector comes from the history, an unknown item's is learned as such. No score comes from random numbers.
    """

    embedding_dim: int
    depends_on_target: bool

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor) -> Tensor:
        """(B,), (B, H), (B,) -> (B, embedding_dim). Target is read only where ``depends_on_target``."""
        ...

    def item_vectors(self, item_idx: Tensor) -> Tensor:
        """(M,) -> (M, embedding_dim)."""
        ...

    def score(self, user_idx: Tensor, history: Tensor, item_idx: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,), (B, H), (B,) and, with ``cf.feedback: all``, (B, F) -> (B,) logits of a like, biases included."""
        ...


class TrainableCfModel(ABC, nn.Module):
    """What the models share: tables, biases, export. A model of one's own says how a user's vector is made.

    logit(like) = global bias + user bias + item bias + match(user vector, item vector); the match is the inner
    product unless a model says otherwise.

    **Exported vectors** (``user_vectors``, ``item_vectors``) have E + 1 numbers: the vector, rotated where folds are
    aligned to each other, and the bias. They are relative to an unknown user without history and to the unknown item,
    so zero means "nothing is known", and unit-scaled: multiplied by one factor for users and one for items, such that
    the root mean square of the norms is 1. Directions and relative lengths stay, and the language model's mapping
    sees inputs of one size whatever model and width made them. ``score`` uses the vectors as they were trained.

    Attributes:
        history_length: liked items that the model reads in training.
        trains_on_history: whether training reads histories at all; a model that reads them only for unknown users
            is spared the work.
        supports_tuning: whether stage 2 can go on training it (``stage2.train_cf``).
    """

    depends_on_target: ClassVar[bool] = False
    trains_on_history: ClassVar[bool] = True
    supports_tuning: ClassVar[bool] = True
    user_scale: Tensor
    item_scale: Tensor
    rotation: Tensor

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        embedding_dim: int,
        history_length: int,
        user_dim: int = 0,
        item_dim: int | None = None,
        sparse: bool = True,
    ) -> None:
        """Make the tables, all zero; ``init_weights`` fills them.

        Args:
            num_users: U, users that this process owns.
            num_items: I.
            embedding_dim: E.
            history_length: see the class.
            user_dim, item_dim: width of a learned vector: E (the default for items), or 0 where only the bias is.
            sparse: whether a step touches only the rows of its batch.
        """
        super().__init__()
        self.dim, self.embedding_dim, self.history_length = embedding_dim, embedding_dim + 1, history_length
        self.users = UserTable(num_users, user_dim, sparse=sparse)
        self.items = ItemTable(num_items, embedding_dim if item_dim is None else item_dim, sparse=sparse)
        self.wide: nn.Linear | None = None
        self.global_bias = nn.Parameter(torch.zeros(1))  # not (): DeepSpeed cannot broadcast a parameter without axes
        self.register_buffer("user_scale", torch.ones(()))
        self.register_buffer("item_scale", torch.ones(()))
        self.register_buffer("rotation", torch.eye(embedding_dim))

    def add_wide(self) -> None:
        """Let scores read what was counted of user and item before each row (``cf.feedback: all``), linearly.

        It is no part of the exported vectors: the pair slot carries the same statistics.
        """
        self.wide = nn.Linear(len(PAIR_FEATURES), 1, bias=False)
        nn.init.zeros_(self.wide.weight)

    def weigh_features(self, batch: CfBatch) -> Tensor | float:
        """Return what the statistics add to the (B,) logits."""
        if self.wide is None or batch.features is None:
            return 0.0
        added: Tensor = self.wide(batch.features)[:, 0]
        return added

    @abstractmethod
    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return (C, E) vectors of a batch's contexts; (B, E) of its targets where ``depends_on_target``."""

    def match(self, users: Tensor, batch: CfBatch, items: Tensor) -> Tensor:
        """Return (B,) from the vectors that ``compute_user_vectors`` made and (B, E) item vectors."""
        if not self.depends_on_target:
            users = functional.embedding(batch.target_contexts, users)
        return (users * items).sum(dim=-1)

    def forward(self, batch: CfBatch) -> Tensor:
        """Return the (B,) logits of a batch's targets."""
        items = self.item_rows(batch.item_idx)
        matched = self.match(self.compute_user_vectors(batch), batch, items[:, :-1])
        biases = self.global_bias + self.user_biases(batch)[batch.target_contexts] + items[:, -1]
        return biases + matched + self.weigh_features(batch)

    def item_rows(self, item_idx: Tensor) -> Tensor:
        """(...) -> (..., E + 1): vector and bias of each item as scoring reads them."""
        rows: Tensor = self.items(item_idx)
        return rows

    def history_vectors(self, history: Tensor) -> Tensor:
        """(C, H) -> (C, H, E): vectors of the items, zeros at the padding.

        Padding is not looked up: as an index, -1 is the unknown item, whose row would then be moved by every batch
        that happens to be padded.
        """
        is_item = history >= 0
        vectors = self.item_rows(history[is_item])[:, :-1]
        return vectors.new_zeros(*history.shape, vectors.shape[1]).index_put((is_item,), vectors)

    def user_biases(self, batch: CfBatch) -> Tensor:
        """Return (C,) biases, zero for unknown users."""
        rows: Tensor = self.users(batch.user_idx)
        return rows[:, -1]

    def score(self, user_idx: Tensor, history: Tensor, item_idx: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,), (B, H), (B,), (B, F) -> (B,) logits."""
        logits: Tensor = self(CfBatch.from_pairs(user_idx, self._cut(history), item_idx, features))
        return logits

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor) -> Tensor:
        """(B,), (B, H), (B,) -> (B, E + 1) exported vectors."""
        batch = CfBatch.from_pairs(user_idx, self._cut(history), target)
        nobody = CfBatch.from_pairs(user_idx.new_full((1,), -1), history.new_empty(1, 0), user_idx.new_full((1,), -1))
        relative = self._rotate(self.compute_user_vectors(batch) - self.compute_user_vectors(nobody))
        return torch.cat([relative, self.user_biases(batch)[:, None]], dim=1) * self.user_scale

    def item_vectors(self, item_idx: Tensor) -> Tensor:
        """(M,) -> (M, E + 1) exported vectors."""
        relative = self.item_rows(item_idx) - self.item_rows(item_idx.new_full((1,), -1))
        return torch.cat([self._rotate(relative[:, :-1]), relative[:, -1:]], dim=1) * self.item_scale

    def init_weights(
        self, user_counts: Tensor, item_counts: Tensor, user_numbers: Tensor, *, scale: float, seed: int
    ) -> None:
        """Draw the weights, the same ones on any number of workers.

        Args:
            user_counts: (U,) training rows of each owned user.
            item_counts: (I + 1,) of each item over all workers; the last is how often the unknown item will be met.
            user_numbers: (U,) dense index of each owned user.
            scale: standard deviation of the vectors.
            seed: of the draw.
        """
        self.users.init_weights(user_counts, user_numbers, scale, 2 * seed)
        self.items.init_weights(item_counts, torch.arange(len(item_counts)), scale, 2 * seed + 1)

    def penalty(self, batch: CfBatch, weight_decay: float, bias_weight_decay: float) -> Tensor:
        """Return (): the batch's share of the squares that weight decay keeps small, see ``tables``."""
        users, items = batch.user_idx[batch.target_contexts], self.items.resolve(batch.item_idx)
        decays = weight_decay, bias_weight_decay
        return self.users.penalty(users, *decays) + self.items.penalty(items, *decays)

    def prepare(self, train: Rows) -> None:
        """Take what is needed of a worker's training rows; all workers call it together. Nothing by default."""

    def refresh(self) -> None:
        """Bring up to date what scoring reads beside the weights; all workers call it together. Nothing by default."""

    def _rotate(self, vectors: Tensor) -> Tensor:
        """(R, E) -> (R, E), in the precision of the rotation: in stage 2 the tables may be in bfloat16."""
        return vectors.to(self.rotation.dtype) @ self.rotation

    def _cut(self, history: Tensor) -> Tensor:
        return history[:, max(history.shape[1] - self.history_length, 0) :]


def list_shared(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are the same on every worker: all but those of the owned users."""
    return [(name, one) for name, one in model.named_parameters() if not is_local(name)]


def is_local(name: str) -> bool:
    """Return whether a tensor of the state has a row for each owned user."""
    return name.startswith("users.")
