"""Floating-point operations of decoders: what a step needs, and what a plainer way of doing it would.

Counted are matrix products, two operations for a multiplication and an addition; everything else is small beside
them. Backward passes count products with activations alone, since the backbone's weights get no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from collm_dist.prompt_batch import PromptBatch


@dataclass(frozen=True)
class DecoderShape:
    """What the cost of a decoder follows from.

    Attributes:
        num_layers: L.
        layer_weights: entries of the weight matrices of one layer.
        attention_width: query heads times their width.
        key_width: key/value heads times their width.
        hidden_size: D.
        vocabulary: rows of the head.
    """

    num_layers: int
    layer_weights: int
    attention_width: int
    key_width: int
    hidden_size: int
    vocabulary: int

    @classmethod
    def from_model(cls, backbone: Any) -> DecoderShape:
        """Read it off a model, adapters not counted; weights on the meta device will do."""
        decoder, config = backbone.get_decoder(), backbone.config.get_text_config()
        linear = [
            module.in_features * module.out_features  # quantized weights are packed: they have fewer entries
            for name, module in decoder.layers.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name
        ]
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            num_layers=len(decoder.layers),
            layer_weights=sum(linear) // len(decoder.layers),
            attention_width=heads * width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
            hidden_size=config.hidden_size,
            vocabulary=backbone.get_output_embeddings().weight.shape[0],
        )

    def count_forward(self, tokens: int, pairs: int) -> int:
        """Return the operations of a forward pass below the head.

        Args:
            tokens: that pass through.
            pairs: (query, key) positions that attention compares, over all rows.
        """
        return self.num_layers * (2 * self.layer_weights * tokens + 4 * self.attention_width * pairs)

    def count_backward(self, tokens: int, pairs: int) -> int:
        """Return those of the backward pass, with frozen weights: one product for each of the forward pass, two in
        attention, where both factors are activations."""
        return self.num_layers * (2 * self.layer_weights * tokens + 8 * self.attention_width * pairs)

    def count_head(self, tokens: int) -> int:
        """Return those of the head's product with all of the vocabulary."""
        return 2 * self.vocabulary * self.hidden_size * tokens


@dataclass(frozen=True)
class StepCost:
    """What some rows cost.

    Attributes:
        tokens: positions computed forward.
        trained_tokens: positions computed backward.
        flops: operations, forward and backward.
    """

    tokens: int
    trained_tokens: int
    flops: int

    def __add__(self, other: StepCost) -> StepCost:
        """Add up."""
        return StepCost(
            self.tokens + other.tokens, self.trained_tokens + other.trained_tokens, self.flops + other.flops
        )


def count_shared(shape: DecoderShape, batch: PromptBatch, *, training: bool, cached: bool = False) -> StepCost:
    """Return what a micro-batch costs with shared contexts if nothing is spent on padding.

    Args:
        shape: of the decoder.
        batch: laid out by a collator.
        training: whether there is a backward pass, over the tree alone.
        cached: whether the prefixes' keys and values are at hand.
    """
    header, prefix = len(batch.header_ids), batch.prefix_lengths.numbers
    context_lengths = header + prefix[batch.prefix_rows.numbers]
    rows, targets = batch.tree_lengths.list_rows(), batch.tree_targets
    tails = torch.bincount(rows[targets < 0], minlength=len(context_lengths)).numpy()
    branches = torch.bincount(targets[targets >= 0], minlength=len(batch.last)).numpy()
    branch_contexts = (context_lengths + tails)[rows[batch.last].numpy()]  # what stands before each branch
    constant, constant_pairs = int(prefix.sum()), int((prefix * (header + prefix)).sum())
    trained = len(batch.tree_ids)
    trained_pairs = int((tails * (context_lengths + tails)).sum() + (branches * (branch_contexts + branches)).sum())
    if constant:
        constant, constant_pairs = constant + header, constant_pairs + header * header
    else:
        trained, trained_pairs = trained + header, trained_pairs + header * header
    flops = 0 if cached else shape.count_forward(constant, constant_pairs)
    flops += shape.count_forward(trained, trained_pairs)
    if training:
        flops += shape.count_backward(trained, trained_pairs)
    return StepCost((0 if cached else constant) + trained, trained * training, flops)


def count_padded(shape: DecoderShape, rows: int, width: int, *, training: bool, full_head: bool) -> StepCost:
    """Return what plain padded rows cost.

    Args:
        shape: of the decoder.
        rows, width: of the batch.
        training: whether there is a backward pass; it reaches all positions.
        full_head: whether logits are computed at every position.
    """
    tokens, pairs = rows * width, rows * width * width
    head = shape.count_head(tokens if full_head else rows)
    flops = shape.count_forward(tokens, pairs) + head
    if training:
        flops += shape.count_backward(tokens, pairs) + head
    return StepCost(tokens, tokens * training, flops)
