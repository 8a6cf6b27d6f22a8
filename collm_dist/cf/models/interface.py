"""Interface and base class of the CF models.

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
from collm_dist.data.samples.pair_features import PAIR_FEATURES


@runtime_checkable
class CfModel(Protocol):
    """A module that scores pairs and provides vectors for the slots of the language model.

    Index -1, indices beyond the tables, and users and items without training rows are unknown. An unknown user's
    vector comes from the history; the unknown item has a learned vector. No score depends on random numbers.
    """

    embedding_dim: int
    depends_on_target: bool

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor) -> Tensor:
        """(B,), (B, H), (B,) -> (B, embedding_dim). Target is read only if ``depends_on_target``."""
        ...

    def item_vectors(self, item_idx: Tensor) -> Tensor:
        """(M,) -> (M, embedding_dim)."""
        ...

    def score(self, user_idx: Tensor, history: Tensor, item_idx: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,), (B, H), (B,) and, with ``cf.feedback: all``, (B, F) -> (B,) logits of a like, biases included."""
        ...


class TrainableCfModel(ABC, nn.Module):
    """Base class of all models: tables, biases, export. A subclass defines ``compute_user_vectors``.

    A model that reads the graph of training rows also overrides ``prepare``, ``refresh`` and ``item_rows``, and
    registers buffers with a row per owned user on ``self.users`` (see ``LightGcn``).

    logit(like) = global bias + user bias + item bias + match(user vector, item vector). The match is the inner product
    unless a subclass overrides it.

    **Exported vectors** (``user_vectors``, ``item_vectors``) have E + 1 numbers: the vector, rotated to align folds,
    and the bias. They are relative to an unknown user without history and to the unknown item, so zero means "nothing
    is known". They are unit-scaled: multiplied by one factor for users and one for items that makes the root mean
    square of the norms 1. This keeps directions and relative lengths, and gives the mapping inputs of the same size
    for every model and width. ``score`` uses the vectors as trained.

    Attributes:
        depends_on_target: whether user vectors depend on the target item.
        history_length: maximum number of liked items that the model reads.
        trains_on_history: whether training reads histories; False saves gathering them for models that read them
            only for unknown users.
        supports_tuning: whether stage 2 can train the model (``stage2.train_cf``).
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
        """Build the tables with zeros; ``init_weights`` fills them.

        Args:
            num_users: U, users that this process owns.
            num_items: I.
            embedding_dim: E.
            history_length: see the class.
            user_dim, item_dim: width of the learned vectors: E (the default for items), or 0 for biases only.
            sparse: whether a step updates only the rows of its batch.
        """
        super().__init__()
        self.dim, self.embedding_dim, self.history_length = embedding_dim, embedding_dim + 1, history_length
        self.users = UserTable(num_users, user_dim, sparse=sparse)
        self.items = ItemTable(num_items, embedding_dim if item_dim is None else item_dim, sparse=sparse)
        self.wide: nn.Linear | None = None
        self.global_bias = nn.Parameter(torch.zeros(1))  # not (): DeepSpeed cannot broadcast 0-dim parameters
        self.register_buffer("user_scale", torch.ones(()))
        self.register_buffer("item_scale", torch.ones(()))
        self.register_buffer("rotation", torch.eye(embedding_dim))

    def add_wide(self) -> None:
        """Add a linear term in the as-of counts of user and item to the scores (``cf.feedback: all``).

        Exported vectors do not include it: the pair slot carries the same statistics.
        """
        self.wide = nn.Linear(len(PAIR_FEATURES), 1, bias=False)
        nn.init.zeros_(self.wide.weight)

    def feature_logits(self, batch: CfBatch) -> Tensor | float:
        """Return the statistics' contribution to the (B,) logits."""
        if self.wide is None or batch.features is None:
            return 0.0
        logits: Tensor = self.wide(batch.features)[:, 0]
        return logits

    @abstractmethod
    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return (C, E) vectors of a batch's contexts, or (B, E) of its targets if ``depends_on_target``."""

    def match(self, users: Tensor, batch: CfBatch, items: Tensor) -> Tensor:
        """Return (B,) matches of the vectors from ``compute_user_vectors`` and (B, E) item vectors."""
        if not self.depends_on_target:
            users = functional.embedding(batch.target_contexts, users)
        return (users * items).sum(dim=-1)

    def forward(self, batch: CfBatch) -> Tensor:
        """Return the (B,) logits of a batch's targets."""
        items = self.item_rows(batch.item_idx)
        matched = self.match(self.compute_user_vectors(batch), batch, items[:, :-1])
        biases = self.global_bias + self.user_biases(batch)[batch.target_contexts] + items[:, -1]
        return biases + matched + self.feature_logits(batch)

    def compute_queries(self, batch: CfBatch) -> Tensor | None:
        """Return (C, E + 1) vectors whose inner products with ``item_rows`` are the logits, up to a user's constant.

        None if the match is another function than the inner product.
        """
        if self.depends_on_target or type(self).match is not TrainableCfModel.match:
            return None
        users = self.compute_user_vectors(batch)
        return torch.cat([users, users.new_ones(len(users), 1)], dim=1)

    def item_rows(self, item_idx: Tensor) -> Tensor:
        """(...) -> (..., E + 1): vector and bias of each item, as used in scoring."""
        rows: Tensor = self.items(item_idx)
        return rows

    def history_vectors(self, history: Tensor) -> Tensor:
        """(C, H) -> (C, H, E): vectors of the items, zeros at the padding.

        Padding is not looked up: index -1 is the unknown item, whose row every padded batch would then update.
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
        unknown = CfBatch.from_pairs(user_idx.new_full((1,), -1), history.new_empty(1, 0), user_idx.new_full((1,), -1))
        relative = self._rotate(self.compute_user_vectors(batch) - self.compute_user_vectors(unknown))
        return torch.cat([relative, self.user_biases(batch)[:, None]], dim=1) * self.user_scale

    def item_vectors(self, item_idx: Tensor) -> Tensor:
        """(M,) -> (M, E + 1) exported vectors."""
        relative = self.item_rows(item_idx) - self.item_rows(item_idx.new_full((1,), -1))
        return torch.cat([self._rotate(relative[:, :-1]), relative[:, -1:]], dim=1) * self.item_scale

    def init_weights(
        self, user_counts: Tensor, item_counts: Tensor, user_numbers: Tensor, *, scale: float, seed: int
    ) -> None:
        """Draw the tables; they do not depend on the number of workers.

        A subclass draws its layers in ``__init__``, from a parameter ``seed``.

        Args:
            user_counts: (U,) training rows of each owned user.
            item_counts: (I + 1,) training rows of each item over all workers; the last entry is the expected number
                of rows of the unknown item.
            user_numbers: (U,) dense index of each owned user.
            scale: standard deviation of the vectors.
            seed: of the draws.
        """
        self.users.init_weights(user_counts, user_numbers, scale, 2 * seed)
        self.items.init_weights(item_counts, torch.arange(len(item_counts)), scale, 2 * seed + 1)

    def backpropagate(
        self, batch: CfBatch, labels: Tensor, scale: float, weight_decay: float, bias_weight_decay: float
    ) -> Tensor:
        """Compute ``grad`` of the parameters from one batch, after ``Optimizers.zero_grad``.

        Args:
            batch: of training rows.
            labels: (B,) float, 1 = like.
            scale: factor of loss and penalty.
            weight_decay, bias_weight_decay: see ``penalty``.

        Returns:
            The sum of the rows' losses () without scale and penalty.
        """
        loss = functional.binary_cross_entropy_with_logits(self(batch), labels, reduction="sum")
        penalty = self.penalty(batch, weight_decay, bias_weight_decay)
        ((loss + penalty) * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def penalty(self, batch: CfBatch, weight_decay: float, bias_weight_decay: float) -> Tensor:
        """Return the batch's share of the weight-decay penalty (), see ``embedding_tables``."""
        users, items = batch.user_idx[batch.target_contexts], self.items.resolve(batch.item_idx)
        decays = weight_decay, bias_weight_decay
        penalty = self.users.penalty(users, *decays) + self.items.penalty(items, *decays)
        return penalty if self.items.text is None else penalty + self.items.text.penalty(len(items), *decays)

    def prepare(self, train: Rows) -> None:
        """Precompute from a worker's training rows, once before training; all workers call this together."""

    def refresh(self) -> None:
        """Update cached tensors that scoring reads, after each epoch; all workers call this together."""

    def _rotate(self, vectors: Tensor) -> Tensor:
        """(R, E) -> (R, E), in the dtype of the rotation: in stage 2 the tables may be in bfloat16."""
        return vectors.to(self.rotation.dtype) @ self.rotation

    def _cut(self, history: Tensor) -> Tensor:
        return history[:, max(history.shape[1] - self.history_length, 0) :]


def list_shared(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that all workers share: all but the users' rows."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not is_local(name)]


def is_local(name: str) -> bool:
    """Return whether a state-dict entry has a row for each owned user."""
    return name.startswith("users.")
