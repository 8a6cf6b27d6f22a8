"""The CoLLM module: backbone, slots and a one-logit head (CoLLM, section 3.2).

Shapes: M tokens of prefixes and tree rows, N targets, S slots, Q user queries, K soft tokens a slot, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from collm_dist.llm.lora_dropout import install_keyed_dropout
from collm_dist.llm.packed.passes import Prefix, run_prefix, run_tree
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.prompt_batch import Mirrored, PromptBatch, Slots


class CollaborativeVectors(Protocol):
    """What the module asks of a collaborative model. Zero is the vector of an unknown user or item.

    Timestamps (seconds since 1970) say as of when: what a training row's slots carry must not have seen its label.
    """

    @property
    def embedding_dim(self) -> int:
        """E."""
        ...

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor, timestamp: Tensor) -> Tensor:
        """(Q,), (Q, H), (Q,), (Q,) -> (Q, E)."""
        ...

    def item_vectors(self, item_idx: Tensor, timestamp: Tensor) -> Tensor:
        """(M,), (M,) -> (M, E)."""
        ...


class CollmModel(nn.Module):
    """Scores targets: the logit of a like.

    The full vocabulary's logits never exist: a score is one dot product of the target's last hidden state with the
    head's rows of the answers.
    """

    answer_rows: Tensor
    answer_bias: Tensor

    def __init__(
        self,
        backbone: Any,
        answer_ids: tuple[int, int],
        score: Literal["yes_minus_no", "yes"],
        slot_mapper: SlotMapper | None = None,
        cf_model: CollaborativeVectors | None = None,
        *,
        detach_cf: bool = True,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: a transformers causal language model with its weights whole (not yet partitioned): the answers'
                rows of its head are copied, since the head never trains. The dropout of its adapter, if it has one, is
                replaced by one whose masks follow from counters.
            answer_ids: token ids of yes and no.
            score: see ``prompt.score``.
            slot_mapper: None for text-only prompts.
            cf_model: None if no slot reads collaborative vectors.
            detach_cf: whether the collaborative model is frozen; it is then no part of the module, and is left on the
                device and in the precision that it has.
            prefix_cache: keeps constant prefixes; for a frozen backbone alone.
        """
        super().__init__()
        self.backbone = backbone
        self.slot_mapper = slot_mapper
        # A frozen collaborative model stands beside the module, not in it: what wraps the module (ZeRO-3, bfloat16)
        # would take its tables apart or round them.
        self.cf_model: Any
        if detach_cf:
            self.__dict__["cf_model"] = cf_model
        else:
            self.cf_model = cf_model
        self.detach_cf, self.prefix_cache = detach_cf, prefix_cache
        self._kept_header: tuple[int, Prefix] | None = None
        self._dropout_masks = install_keyed_dropout(backbone)
        self.score = score
        head = backbone.get_output_embeddings()
        answers = torch.tensor(answer_ids, device=head.weight.device)
        bias = head.bias[answers] if getattr(head, "bias", None) is not None else torch.zeros(2, device=answers.device)
        self.register_buffer("answer_rows", head.weight[answers].detach().clone(), persistent=False)
        self.register_buffer("answer_bias", bias.detach().clone(), persistent=False)

    @property
    def decoder(self) -> Any:
        """The backbone below its language-modelling head."""
        return (
            self.backbone.base_model if self.backbone.base_model is not self.backbone else self.backbone.get_decoder()
        )

    @property
    def _backbone_trains(self) -> bool:
        return any(one.requires_grad for one in self.backbone.parameters())

    def train(self, mode: bool = True) -> CollmModel:
        """Switch dropout on or off; never on in a part that does not train.

        Weights may have changed until then, but not from step to step of a frozen backbone.
        """
        if mode != self.training or self._backbone_trains:
            self._kept_header = None
        super().train(mode)
        for part in (self.backbone, self.cf_model):
            if isinstance(part, nn.Module) and not any(one.requires_grad for one in part.parameters()):
                part.eval()
        return self

    def forward(self, batch: PromptBatch, dropout_key: int = 0) -> Tensor:
        """Return the (N,) float32 scores of a batch's targets.

        Args:
            batch: on the model's device.
            dropout_key: of seed and step; from it and the batch the masks follow.
        """
        if self._dropout_masks is not None and self.training:
            self._dropout_masks.draw(batch, dropout_key)
        embed = self.backbone.get_input_embeddings()
        header = embed(batch.header_ids) if len(batch.header_ids) else None
        tokens = self._insert_slots(embed(torch.cat([batch.prefix_ids, batch.tree_ids])), batch)
        of_prefix, of_tree = torch.split(tokens, [len(batch.prefix_ids), len(batch.tree_ids)])
        prefix = self._run_prefix(of_prefix, batch, header) if len(of_prefix) else None
        hidden = run_tree(
            self.decoder,
            of_tree,
            batch.tree_targets,
            batch.tree_positions,
            batch.tree_lengths,
            prefix,
            header if prefix is None else None,
            needed=batch.last,
            segments=batch.tree_segments,
        )
        return self._compute_scores(hidden[batch.last])

    @torch.no_grad()
    def _run_prefix(self, embeds: Tensor, batch: PromptBatch, header: Tensor | None) -> Prefix:
        """Return the keys and values of each row's prefix; equal ones are computed once."""
        before = None if header is None else self._run_header(header, batch.header_key)
        if self.prefix_cache is not None:
            prefix = self.prefix_cache.run(
                self.decoder, embeds, batch.prefix_lengths, batch.prefix_keys.tolist(), before
            )
        else:
            prefix = run_prefix(self.decoder, embeds, batch.prefix_lengths, before)
        return dataclasses.replace(prefix, rows=batch.prefix_rows)

    def _run_header(self, embeds: Tensor, key: int) -> Prefix:
        """Return the keys and values of a (U, D) header; kept while the weights that made them cannot change."""
        if self._kept_header is not None and self._kept_header[0] == key:
            return self._kept_header[1]
        header = run_prefix(self.decoder, embeds, Mirrored.of([len(embeds)], embeds.device))
        if not (self.training and self._backbone_trains):
            self._kept_header = key, header
        return header

    def _insert_slots(self, embeds: Tensor, batch: PromptBatch) -> Tensor:
        """Put the soft tokens in their places; (M, D) -> (M, D)."""
        if self.slot_mapper is None:
            return embeds
        if self.slot_mapper.cf is not None and self.cf_model is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_cf):
                users = self.cf_model.user_vectors(
                    batch.user_idx, batch.user_history, batch.user_target, batch.user_timestamps
                )
                items = self.cf_model.item_vectors(batch.item_slots.sources, batch.item_timestamps)
                vectors = torch.cat([users[batch.user_slots.sources], items])
                vectors = vectors.to(self.slot_mapper.cf.hidden.weight.dtype)
            slots = _join_slots(batch.user_slots, batch.item_slots)
            embeds = _place(embeds, slots, self.slot_mapper.cf(_mask(vectors, slots.masked)))
        if self.slot_mapper.pair is not None:
            features = batch.pair_features[batch.pair_slots.sources].to(self.slot_mapper.pair.hidden.weight.dtype)
            embeds = _place(embeds, batch.pair_slots, self.slot_mapper.pair(_mask(features, batch.pair_slots.masked)))
        return embeds

    def _compute_scores(self, hidden: Tensor) -> Tensor:
        """(N, D) last hidden states -> (N,) scores, with the head's bias, scale and soft cap where it has them."""
        logits = hidden.float() @ self.answer_rows.float().T + self.answer_bias.float()
        config = self.backbone.config.get_text_config()
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits[:, 0] if self.score == "yes" else logits[:, 0] - logits[:, 1]


def _mask(vectors: Tensor, masked: Tensor) -> Tensor:
    """Replace masked rows by the vector of an unknown user or item: zero."""
    return vectors.masked_fill(masked[:, None], 0.0)


def _join_slots(first: Slots, second: Slots) -> Slots:
    """Two kinds of slots that share a mapping. Their sources mean different things and are no longer used."""
    return Slots(
        *(torch.cat([getattr(first, name), getattr(second, name)]) for name in ("places", "sources", "masked"))
    )


def _place(embeds: Tensor, slots: Slots, tokens_SKD: Tensor) -> Tensor:
    """Return the (M, D) embeddings with the soft tokens of the slots in their places."""
    places = slots.places[:, None] + torch.arange(tokens_SKD.shape[1], device=embeds.device)
    return embeds.index_put((places,), tokens_SKD.to(embeds.dtype))
