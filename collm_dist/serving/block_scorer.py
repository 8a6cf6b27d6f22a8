"""Scoring of context blocks by the language model, or by the collaborative model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.errors import ArtifactError, RequestError
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.runs.run_dir import StageName
from collm_dist.tuning.loaded_stage import LoadedStage

# Bytes of keys and values cached while the candidates of a context span several micro-batches.
_CACHE_BYTES = 2 << 30

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreParts:
    """Scores of B targets and what they consist of: scores = anchors + llm + bias.

    Attributes:
        scores: (B,) logits of a like.
        anchors: (B,) anchors; None if the run has no anchor.
        llm: (B,) shares of the language model, its score times the gain.
        bias: the same for all targets; 0 without an anchor.
    """

    scores: Scores
    anchors: Scores | None
    llm: Scores
    bias: float


class BlockScorer:
    """The models of a finished run. They are not thread-safe."""

    def __init__(
        self, stage: StageName, loaded: LoadedStage, cf: SlotVectors | None, item_ids: Sequence[str], max_tokens: int
    ) -> None:
        """Store the models.

        Args:
            stage: stage of the model, for messages.
            loaded: the stage's model.
            cf: collaborative model that orders items; None if the run has no such model.
            item_ids: raw id of each item, for messages.
            max_tokens: most tokens of a micro-batch.
        """
        self._stage, self._loaded, self._cf, self._item_ids = stage, loaded, cf, item_ids
        self._collator, self._max_tokens = loaded.collator.for_scoring(), max_tokens

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._loaded.device

    @property
    def has_cf(self) -> bool:
        """Whether the run has a collaborative model that orders items."""
        return self._cf is not None

    def score(self, block: ContextBlock) -> Scores:
        """Return (B,) logits of a block's targets by the language model.

        Raises:
            ArtifactError: a score is not finite.
        """
        return self._score(block)[0]

    def score_parts(self, block: ContextBlock) -> ScoreParts:
        """Return the scores of ``score`` and their parts.

        Raises:
            ArtifactError: a score is not finite.
        """
        scores, anchors = self._score(block)
        anchored_score = self._loaded.model.anchored_score
        if anchored_score is None:
            return ScoreParts(scores, None, scores, 0.0)
        # Scores and anchors are float32 numbers, so their float64 differences are exact.
        bias = anchored_score.compute_bias()
        return ScoreParts(scores, anchors, scores - anchors - bias, bias)

    @torch.inference_mode()
    def _score(self, block: ContextBlock) -> tuple[Scores, Scores]:
        """Return (B,) scores and the (B,) anchors in them."""
        model = self._loaded.model
        planned = plan_micro_batches(block, self._collator.count_tokens(block), 0, 1, self._max_tokens)
        micro_batches = [micro_batch for micro_batch in planned if micro_batch is not None]
        # A context whose candidates span several micro-batches is still computed once.
        contexts = [np.unique(block.target_contexts[micro_batch.row_id]) for micro_batch in micro_batches]
        is_divided = sum(map(len, contexts)) > block.num_contexts
        model.prefix_cache = PrefixCache(_CACHE_BYTES) if is_divided else None
        batches = (self._collator.collate(micro_batch, block).to(self.device) for micro_batch in micro_batches)
        found = [(model(batch), batch.anchors) for batch in batches]
        model.prefix_cache = None
        scores, anchors = np.empty(block.num_targets), np.empty(block.num_targets)
        for micro_batch, (logits, batch_anchors) in zip(micro_batches, found, strict=True):
            scores[micro_batch.row_id] = logits.double().cpu().numpy()
            anchors[micro_batch.row_id] = batch_anchors.double().cpu().numpy()
        if not np.isfinite(scores).all():
            raise ArtifactError(
                f"{self._stage}: the score of item {self._item_ids[block.item_idx[~np.isfinite(scores)][0]]!r} is not "
                "finite, because of the weights or the precision; try llm.dtype: float32, or train again"
            )
        return scores, anchors

    @torch.inference_mode()
    def compute_item_vectors(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (I, E + 1) vectors of all items in the collaborative model, for an index.

        Args:
            features: (I, F) statistics of each item with an unknown user, which a model of all feedback reads.
        """
        assert self._cf is not None
        final = self._cf.final
        vectors = final.item_rows(torch.arange(len(features), device=self.device)).float()
        if final.wide is not None:
            vectors = vectors.clone()
            vectors[:, -1] += final.wide(torch.from_numpy(features).to(self.device))[:, 0]
        return vectors.cpu().numpy()

    @torch.inference_mode()
    def compute_queries(self, block: ContextBlock) -> NDArray[np.float32] | None:
        """Return the (C, E + 1) query vectors of a block's contexts; None if the scores are not inner products."""
        if self._cf is None:
            return None
        final = self._cf.final
        queries = final.compute_queries(CfBatch.from_block(block, final.history_length, self.device))
        return None if queries is None else queries.float().cpu().numpy()

    @torch.inference_mode()
    def score_by_cf(self, block: ContextBlock) -> Scores:
        """Return (B,) logits of a block's targets by the collaborative model of all training rows.

        Raises:
            RequestError: the run has no collaborative model.
        """
        if self._cf is None:
            raise RequestError("candidates: the run has no collaborative model to retrieve or order items; list them")
        final = self._cf.final
        logits: Tensor = final(CfBatch.from_block(block, final.history_length, self.device))
        return logits.double().cpu().numpy()
