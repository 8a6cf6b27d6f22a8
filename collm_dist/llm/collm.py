"""The CoLLM module: backbone, slots and a one-logit head (CoLLM, section 3.2).

Shapes: M tokens of prefixes and tree rows, U tokens of the header, N targets, S slots, Q user queries, E width of a
collaborative vector, K soft tokens a slot, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from collm_dist.llm.anchored_score import AnchoredScore
from collm_dist.llm.lora_dropout import DroppedLinear, install_keyed_dropout
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.packed.kept_contexts import KeptContexts
from collm_dist.llm.packed.passes import Prefix, run_prefix, run_tree
from collm_dist.llm.packed.prefix_cache import PrefixCache, RunPrefixes
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.llm.title_likelihood import TITLE_SCALE, TitlePriors, sum_title_logs
from collm_dist.llm.token_keys import key_tokens
from collm_dist.prompt_batch import Mirrored, PromptBatch, Slots


class CollaborativeVectors(Protocol):
    """Interface of a collaborative model. Zero is the vector of an unknown user or item.

    Timestamps (seconds since 1970) limit what a vector may know: the slots of a training row must not have seen its
    label.
    """

    @property
    def embedding_dim(self) -> int:
        """E."""
        ...

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor, timestamp: Tensor) -> Tensor:
        """(Q,), (Q, H), (Q,), (Q,) -> (Q, E)."""
        ...

    def item_vectors(self, item_idx: Tensor, timestamp: Tensor) -> Tensor:
        """(S,), (S,) -> (S, E)."""
        ...


class CollmModel(nn.Module):
    """Scores of targets: the logit that the user likes the item.

    The logits of the full vocabulary exist only for the score ``title`` (``title_likelihood``): otherwise a score is a
    dot product of the target's last hidden state with the head's rows of the two answers.

    Attributes:
        kept_contexts: keeps constant prefixes between requests; only for a model that does not train.
    """

    answer_rows: Tensor
    answer_bias: Tensor

    def __init__(
        self,
        backbone: Any,
        answer_ids: tuple[int, int],
        score: Literal["yes_minus_no", "yes", "title"],
        slot_mapper: SlotMapper | None = None,
        cf_model: CollaborativeVectors | None = None,
        *,
        detach_cf: bool = True,
        prefix_cache: PrefixCache | None = None,
        decoder: PackedDecoder | None = None,
        anchored_score: AnchoredScore | None = None,
        title_priors: TitlePriors | None = None,
    ) -> None:
        """Assemble the module.

        Args:
            backbone: a transformers causal language model with whole (not yet partitioned) weights: the answers' rows
                of its head are copied, since the head never trains. The dropout of its adapter, if it has one, is
                replaced by keyed dropout.
            answer_ids: token ids of yes and no.
            score: see ``prompt.score``.
            slot_mapper: None for text-only prompts.
            cf_model: None if no slot reads collaborative vectors.
            detach_cf: the collaborative model is frozen. It is then not a submodule, and stays on its device and in
                its precision.
            prefix_cache: keeps constant prefixes; only for a frozen backbone.
            decoder: of the backbone; None packs it with the defaults.
            anchored_score: adds the score to the batch's anchors; None = the language model scores alone.
            title_priors: for the score ``title``, whose batches have ``PromptBatch.title_places``.
        """
        super().__init__()
        self.backbone = backbone
        self.decoder = PackedDecoder(find_decoder(backbone)) if decoder is None else decoder
        self.slot_mapper, self.anchored_score = slot_mapper, anchored_score
        # Whatever wraps this module (ZeRO-3, bfloat16) would partition or round the tables of a frozen collaborative
        # model, so that one is not registered as a submodule.
        self.cf_model: Any
        if detach_cf:
            object.__setattr__(self, "cf_model", cf_model)
        else:
            self.cf_model = cf_model
        self.detach_cf, self.prefix_cache = detach_cf, prefix_cache
        self.kept_contexts: KeptContexts | None = None
        self._kept_header: tuple[int, Prefix] | None = None
        self._dropout_masks = install_keyed_dropout(backbone)
        self.score, self._title_priors = score, title_priors
        head = backbone.get_output_embeddings()
        answers = torch.tensor(answer_ids, device=head.weight.device)
        bias = head.bias[answers] if getattr(head, "bias", None) is not None else torch.zeros(2, device=answers.device)
        self.register_buffer("answer_rows", head.weight[answers].detach().clone(), persistent=False)
        self.register_buffer("answer_bias", bias.detach().clone(), persistent=False)

    @property
    def _backbone_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def drop_kept(self) -> None:
        """Drop all keys and values that are kept between passes."""
        self._kept_header = None
        if self.kept_contexts is not None:
            self.kept_contexts.drop()
        if self._title_priors is not None:
            self._title_priors.drop()

    def train(self, mode: bool = True) -> CollmModel:
        """Switch the adapter's dropout on or off, and that of a collaborative model that trains.

        The backbone's own dropout, which a few families have, stays off: its masks would depend on micro-batches and
        processes.
        """
        # Weights may have changed since the header was computed, except between steps of a frozen backbone.
        if mode != self.training or self._backbone_trains:
            self.drop_kept()
        super().train(mode)
        self.backbone.eval()
        self._switch_dropout(mode)
        cf_model = self.cf_model
        if isinstance(cf_model, nn.Module) and not any(parameter.requires_grad for parameter in cf_model.parameters()):
            cf_model.eval()
        return self

    def _switch_dropout(self, is_on: bool) -> None:
        for module in self.backbone.modules() if self._dropout_masks is not None else ():
            if isinstance(module, DroppedLinear):
                module.train(is_on)

    def forward(self, batch: PromptBatch, dropout_key: int = 0, with_llm_scores: bool = False) -> Tensor:
        """Return the (N,) float32 scores of a batch's targets.

        Args:
            batch: on the model's device.
            dropout_key: of seed and step; it and the batch determine the masks.
            with_llm_scores: return (2, N): the anchored scores, and those of the language model alone.
        """
        # Before the masks are drawn, which are those of this batch until its backward pass.
        priors = None if self._title_priors is None else self._find_title_priors(self._title_priors, batch)
        if self._dropout_masks is not None and self.training:
            self._dropout_masks.draw(batch, dropout_key)
        hidden = self._run(batch)
        if priors is None:
            scores = self._compute_scores(hidden[batch.last])
        else:
            scores = TITLE_SCALE * (self._sum_title_logs(hidden, batch) - priors)
        if self.anchored_score is None:
            return scores
        anchored: Tensor = self.anchored_score(batch.anchors, scores)
        return torch.stack([anchored, scores.float()]) if with_llm_scores else anchored

    def _run(self, batch: PromptBatch) -> Tensor:
        """Return the (M, D) last hidden states of a batch's tree rows, correct where scores are read."""
        embed = self.backbone.get_input_embeddings()
        header = embed(batch.header_ids) if len(batch.header_ids) else None
        slots, vectors = self._read_vectors(batch)
        tokens = self._insert_slots(embed(torch.cat([batch.prefix_ids, batch.tree_ids])), batch, slots, vectors)
        prefix_tokens, tree_tokens = torch.split(tokens, [len(batch.prefix_ids), len(batch.tree_ids)])
        prefix = self._run_prefix(prefix_tokens, batch, header, slots, vectors) if len(prefix_tokens) else None
        return run_tree(
            self.decoder,
            tree_tokens,
            batch.tree_targets,
            batch.tree_positions,
            batch.tree_lengths,
            prefix,
            header if prefix is None else None,
            needed=batch.last if self._title_priors is None else batch.title_places,
            segments=batch.tree_segments,
        )

    def _find_title_priors(self, priors: TitlePriors, batch: PromptBatch) -> Tensor:
        """Return the (N,) log-likelihoods of the targets' titles without a history, computed without dropout."""
        self._switch_dropout(False)
        try:
            return priors.find(
                batch, lambda plain: self._sum_title_logs(self._run(plain), plain), keep=not self.training
            )
        finally:
            self._switch_dropout(self.training)

    def _sum_title_logs(self, hidden: Tensor, batch: PromptBatch) -> Tensor:
        return sum_title_logs(self.backbone.get_output_embeddings(), self._finish_logits, hidden, batch)

    @torch.no_grad()
    def _run_prefix(
        self, embeds: Tensor, batch: PromptBatch, header: Tensor | None, slots: Slots, vectors: Tensor | None
    ) -> Prefix:
        """Return the keys and values of each row's prefix; equal prefixes are computed once."""
        header_prefix = None if header is None else self._run_header(header, batch.header_key)
        compute = self._reuse_contexts(batch, slots, vectors)
        lengths = batch.prefix_lengths
        if self.prefix_cache is not None:
            prefix = self.prefix_cache.run(
                self.decoder, embeds, lengths, batch.prefix_keys.tolist(), header_prefix, compute
            )
        elif compute is not None:
            prefix = compute(self.decoder, embeds, lengths, header_prefix, range(len(lengths)))
        else:
            prefix = run_prefix(self.decoder, embeds, lengths, header_prefix)
        return dataclasses.replace(prefix, rows=batch.prefix_rows)

    def _reuse_contexts(self, batch: PromptBatch, slots: Slots, vectors: Tensor | None) -> RunPrefixes | None:
        """Return a function that computes the tokens of prefixes that are not kept; None if no contexts are kept."""
        kept = self.kept_contexts
        if kept is None:
            return None
        tokens_per_slot = 1 if self.slot_mapper is None else self.slot_mapper.tokens_per_slot
        keys = key_tokens(batch.prefix_ids, slots.places, vectors, tokens_per_slot)
        divided = np.split(keys, np.cumsum(batch.prefix_lengths.numbers)[:-1])

        def run(
            decoder: PackedDecoder, embeds: Tensor, lengths: Mirrored, header: Prefix | None, rows: Sequence[int]
        ) -> Prefix:
            return kept.run(decoder, embeds, lengths, [divided[row] for row in rows], header, batch.header_key)

        return run

    def _run_header(self, embeds: Tensor, key: int) -> Prefix:
        """Return the keys and values of a (U, D) header; kept while the weights cannot change."""
        if self._kept_header is not None and self._kept_header[0] == key:
            return self._kept_header[1]
        header = run_prefix(self.decoder, embeds, Mirrored.of([len(embeds)], embeds.device))
        if not (self.training and self._backbone_trains):
            self._kept_header = key, header
        return header

    def _read_vectors(self, batch: PromptBatch) -> tuple[Slots, Tensor | None]:
        """Return the slots of collaborative vectors, and these as the mapping reads them, (S, E); None without."""
        slots = _join_slots(batch.user_slots, batch.item_slots)
        if self.slot_mapper is None or self.slot_mapper.cf is None or self.cf_model is None:
            return slots, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_cf):
            users = self.cf_model.user_vectors(
                batch.user_idx, batch.user_history, batch.user_target, batch.user_timestamps
            )
            items = self.cf_model.item_vectors(batch.item_slots.sources, batch.item_timestamps)
            vectors = torch.cat([users[batch.user_slots.sources], items])
            vectors = vectors.to(self.slot_mapper.cf.hidden.weight.dtype)
        return slots, _mask(vectors, slots.masked)

    def _insert_slots(self, embeds: Tensor, batch: PromptBatch, slots: Slots, vectors: Tensor | None) -> Tensor:
        """Put soft tokens into their slots: (M, D) -> (M, D)."""
        if self.slot_mapper is None:
            return embeds
        if self.slot_mapper.cf is not None and vectors is not None:
            embeds = _place(embeds, slots, self.slot_mapper.cf(vectors))
        if self.slot_mapper.pair is not None:
            features = batch.pair_features[batch.pair_slots.sources].to(self.slot_mapper.pair.hidden.weight.dtype)
            embeds = _place(embeds, batch.pair_slots, self.slot_mapper.pair(_mask(features, batch.pair_slots.masked)))
        return embeds

    def _compute_scores(self, hidden: Tensor) -> Tensor:
        """(N, D) last hidden states -> (N,) scores."""
        logits = self._finish_logits(hidden.float() @ self.answer_rows.float().T + self.answer_bias.float())
        return logits[:, 0] if self.score == "yes" else logits[:, 0] - logits[:, 1]

    def _finish_logits(self, logits: Tensor) -> Tensor:
        """Apply the scale and soft cap of the backbone's logits, if it has them."""
        config = self.backbone.config.get_text_config()
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits


def _mask(vectors: Tensor, masked: Tensor) -> Tensor:
    """Replace masked rows by the vector of an unknown user or item: zero."""
    return vectors.masked_fill(masked[:, None], 0.0)


def _join_slots(first: Slots, second: Slots) -> Slots:
    """Join two kinds of slots that share a mapping. Their sources mean different things and are not used any more."""
    return Slots(
        *(torch.cat([getattr(first, name), getattr(second, name)]) for name in ("places", "sources", "masked"))
    )


def _place(embeds: Tensor, slots: Slots, tokens_SKD: Tensor) -> Tensor:
    """Return the (M, D) embeddings with (S, K, D) soft tokens in their slots."""
    places = slots.places[:, None] + torch.arange(tokens_SKD.shape[1], device=embeds.device)
    return embeds.index_put((places,), tokens_SKD.to(embeds.dtype))
