"""Simple scores and statistics of a target known before its row: the inputs of an anchor.

As-of counts and dislikes are of seconds before the row's. The CF logit, co-occurrence and similarity to likes read the
likes of the history, where ``preprocessing.ties: order`` puts those of the same second that stand earlier in the file.

Shapes: N targets, X features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from collm_dist.anchor.cooccurrence import Cooccurrence
from collm_dist.anchor.text_similarity import TEXT_FEATURES, TextSimilarity
from collm_dist.cf.batches import CfBatch
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.data.samples.pair_features import PAIR_FEATURES, compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.metrics import FloatArray

AnchorKind = Literal["cf", "as_of", "blend"]

CF_FEATURES: tuple[str, ...] = ("cf_logit", "cf_unknown")
FEATURES: dict[AnchorKind, tuple[str, ...]] = {
    "cf": CF_FEATURES,
    "as_of": PAIR_FEATURES,
    "blend": (*PAIR_FEATURES, *CF_FEATURES, "cooccurrence", *TEXT_FEATURES),
}


@dataclass(frozen=True)
class FeatureSource:
    """Sources of the features of an anchor.

    Attributes:
        kind: the anchor's kind; ``FEATURES`` lists its features.
        fold_starts: timestamps (seconds) at which time folds 1, 2, ... begin.
        cf: collaborative model on the CPU; None if the kind does not read it, or the run has none.
        texts, cooccurrence: None if the kind does not read them.
        history_length: liked items that the collaborative model reads.
    """

    kind: AnchorKind
    fold_starts: tuple[int, ...]
    cf: SlotVectors | None
    texts: TextSimilarity | None
    cooccurrence: Cooccurrence | None
    history_length: int

    def find_folds(self, block: ContextBlock) -> IntArray:
        """Return the (N,) time fold of each target."""
        return np.searchsorted(np.asarray(self.fold_starts), block.timestamp, side="right")

    def compute(self, block: ContextBlock) -> FloatArray:
        """Return the (N, X) features of a block's targets."""
        parts = []
        if self.kind in ("as_of", "blend"):
            parts.append(compute_pair_features(block).astype(np.float64))
        if self.kind in ("cf", "blend"):
            parts.append(self._compute_cf(block))
        if self.kind == "blend":
            assert self.cooccurrence is not None
            assert self.texts is not None
            parts.append(self.cooccurrence.score(block, self.find_folds(block))[:, None])
            parts.append(self.texts.compute_features(block))
        return np.concatenate(parts, axis=1)

    @torch.no_grad()
    def _compute_cf(self, block: ContextBlock) -> FloatArray:
        """Return (N, 2): the logit by the model of the target's fold, and whether no model knows the row."""
        if self.cf is None:
            return np.stack([np.zeros(block.num_targets), np.ones(block.num_targets)], axis=1)
        batch = CfBatch.from_block(block, self.history_length)
        if self.kind == "blend":  # as in the folds, whose models hold no users: the counts tell of them
            batch = replace(batch, user_idx=torch.full_like(batch.user_idx, -1))
        logits, is_known = self.cf.score_as_of(batch, torch.from_numpy(block.timestamp))
        return np.stack([logits.double().numpy(), 1.0 - is_known.double().numpy()], axis=1)
