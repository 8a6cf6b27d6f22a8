"""Training loss: binary cross-entropy of single targets, and optional terms that compare the targets of a group.

Every term is a sum over the global batch divided by a count of the global batch, so it is independent of processes and
micro-batches:

    bce        per target: cross-entropy of its label
    pairwise   per pair of a like and a dislike in one group: softplus(dislike's score - like's score)
    listwise   per list of a positive and its sampled negatives: softmax cross-entropy of the positive

With an anchor, the loss of the language model's score alone can be added: at a gain of 0 the anchored score gives the
language model no gradient, and later only that of what the anchor leaves over. For a title's likelihood, a score that
has no zero between likes and dislikes, it consists of the terms that compare targets.

Groups and lists are those of ``data/prompts/target_groups.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from collm_dist import monitoring
from collm_dist.config import StageConfig
from collm_dist.prompt_batch import PromptBatch
from collm_dist.tuning.step_batches import StepBatch

IntArray = NDArray[np.int64]

# Tags of ``StepLoss.list_values``.
LOSS_TAGS = (
    monitoring.TRAIN_LOSS,
    monitoring.TRAIN_LOSS_BCE,
    monitoring.TRAIN_LOSS_PAIRWISE,
    monitoring.TRAIN_LOSS_LISTWISE,
)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms besides the cross-entropy, whose weight is 1; None = off.

    Attributes:
        pairwise, listwise: terms that compare targets.
        llm: the same loss of the language model's score alone.
        llm_has_zero: whether that score has a zero between likes and dislikes. A likelihood has none, so only the terms
            that compare targets count for it, if there are any.
    """

    pairwise: float | None = None
    listwise: float | None = None
    llm: float | None = None
    llm_has_zero: bool = True

    @classmethod
    def of(cls, stage: StageConfig, *, scores_titles: bool) -> LossWeights:
        """Return the weights of a stage's config section; ``scores_titles`` as in ``PromptCollator``."""
        return cls(stage.pairwise_weight, stage.listwise_weight, stage.llm_loss_weight, not scores_titles)

    @property
    def keep_groups(self) -> bool:
        """Whether a term compares targets, so that micro-batches must hold whole groups."""
        return self.pairwise is not None or self.listwise is not None


class StepLoss:
    """Loss of one step, summed over this rank's micro-batches.

    Attributes:
        total: this rank's part of the loss of the global batch.
        terms: (3,) cross-entropy, pairwise and listwise term of the scores, without weights; empty if only the first is
            on.
    """

    def __init__(self, weights: LossWeights, step_batch: StepBatch, device: torch.device) -> None:
        """Count the global batch's targets, pairs and lists."""
        self.total = torch.zeros((), device=device)
        self.terms = torch.zeros(3 if weights.keep_groups else 0, device=device)
        self._weights, self._num_targets = weights, step_batch.block.num_targets
        if weights.keep_groups:
            assert step_batch.groups is not None
            self._num_pairs, self._num_lists = count_pairs_and_lists(
                step_batch.block.label, step_batch.groups, step_batch.block.group_id
            )

    def list_values(self) -> Tensor:
        """Return the total followed by the terms: (1,) or (4,), in the order of ``LOSS_TAGS``."""
        return torch.cat([self.total[None], self.terms])

    def add(self, scores: Tensor, batch: PromptBatch, host_batch: PromptBatch) -> Tensor:
        """Return a micro-batch's part of the loss, with gradients.

        Args:
            scores: (N,) scores of the micro-batch; with ``LossWeights.llm`` (2, N): anchored, of the language model.
            batch: the micro-batch, on the device of the scores.
            host_batch: the same on the host.
        """
        llm_weight = self._weights.llm
        loss, terms = self._compute(scores if llm_weight is None else scores[0], batch, host_batch)
        if self._weights.keep_groups:
            self.terms += terms.detach()
        if llm_weight is not None:
            own_loss, own_terms = self._compute(scores[1], batch, host_batch)
            if self._weights.keep_groups and not self._weights.llm_has_zero:
                own_loss = own_loss - own_terms[0]
            loss = loss + llm_weight * own_loss
        self.total += loss.detach()
        return loss

    def _compute(self, scores: Tensor, batch: PromptBatch, host_batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of (N,) scores, and its (3,) terms without weights."""
        losses = binary_cross_entropy_with_logits(scores, batch.labels, reduction="none")
        loss = bce = (losses * batch.weights).sum() / self._num_targets
        pairwise = listwise = torch.zeros_like(loss)
        if self._weights.pairwise is not None and self._num_pairs:
            pairwise = sum_pairs(scores, host_batch) / self._num_pairs
            loss = loss + self._weights.pairwise * pairwise
        if self._weights.listwise is not None and self._num_lists:
            listwise = sum_lists(scores, host_batch) / self._num_lists
            loss = loss + self._weights.listwise * listwise
        return loss, torch.stack([bce, pairwise, listwise])


def count_pairs_and_lists(labels: IntArray, groups: IntArray, lists: IntArray) -> tuple[int, int]:
    """Return the pairs of a like and a dislike in one group, and the lists of a positive with at least one negative.

    Args:
        labels: (N,) 0 or 1.
        groups, lists: (N,) as in ``PromptBatch``.
    """

    def count(keys: IntArray) -> tuple[IntArray, IntArray]:
        distinct, numbers = np.unique(keys, return_inverse=True)
        sizes = np.bincount(numbers, minlength=len(distinct))
        likes = np.bincount(numbers[labels == 1], minlength=len(distinct))
        return likes, sizes - likes

    likes, dislikes = count(groups)
    positives, negatives = count(lists)
    return int((likes * dislikes).sum()), int(((positives > 0) & (negatives > 0)).sum())


def sum_pairs(scores: Tensor, host_batch: PromptBatch) -> Tensor:
    """Return the pairwise term's sum over the pairs of a micro-batch; arguments as for ``StepLoss.add``."""
    labels, real = host_batch.labels.numpy() == 1, host_batch.weights.numpy() > 0
    groups = host_batch.groups.numpy()
    likes, dislikes = np.flatnonzero(labels & real), np.flatnonzero(~labels & real)
    # A list of pairs needs less memory than the matrix of all targets, since groups are small.
    dislikes = dislikes[np.argsort(groups[dislikes], kind="stable")]
    first, last = (np.searchsorted(groups[dislikes], groups[likes], side=side) for side in ("left", "right"))
    sizes = last - first
    steps = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pairs = np.stack([np.repeat(likes, sizes), dislikes[np.repeat(first, sizes) + steps]])
    of_likes, of_dislikes = scores[torch.from_numpy(pairs).to(scores.device)]
    return softplus(of_dislikes - of_likes).sum()


def sum_lists(scores: Tensor, host_batch: PromptBatch) -> Tensor:
    """Return the listwise term's sum over the lists of a micro-batch; arguments as for ``StepLoss.add``."""
    labels, real = host_batch.labels.numpy() == 1, host_batch.weights.numpy() > 0
    lists = host_batch.lists.numpy()
    # Each list's positive first. A list that a step cuts may lack its positive or all negatives; it does not count.
    order = np.lexsort((~labels, lists))
    order = order[real[order]]
    _, starts, sizes = np.unique(lists[order], return_index=True, return_counts=True)
    counts = labels[order[starts]] & (sizes > 1)
    starts, sizes = starts[counts], sizes[counts]
    columns = np.arange(sizes.max(initial=1))
    members = order[np.minimum(starts[:, None] + columns, len(order) - 1)]
    padding = torch.from_numpy(columns >= sizes[:, None]).to(scores.device)
    listed = scores[torch.from_numpy(members).to(scores.device)].masked_fill(padding, -torch.inf)
    return (listed.logsumexp(1) - listed[:, 0]).sum()
