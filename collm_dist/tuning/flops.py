"""FLOPs of a step with shared contexts, and of padded rows for comparison.

Only matmuls count, with two operations per multiply-add; everything else is small. Backward passes count the gradients
of activations, and of weights only if the layers themselves train: an adapter is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from collm_dist.llm.packed.row_blocks import get_head_width
from collm_dist.prompt_batch import PromptBatch


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder that determine its FLOPs.

    Attributes:
        num_layers: L.
        layer_weights: elements of one layer's weight matrices.
        attention_width: query heads times head width.
        key_width: key/value heads times head width.
        hidden_size: D.
        vocabulary: rows of the language-modelling head.
        trains_layers: all weights of the layers train (``lora.rank: full``).
    """

    num_layers: int
    layer_weights: int
    attention_width: int
    key_width: int
    hidden_size: int
    vocabulary: int
    trains_layers: bool = False

    @classmethod
    def from_model(cls, backbone: Any) -> DecoderShape:
        """Return the sizes of a model without its adapters; it may be on the meta device."""
        decoder, config = backbone.get_decoder(), backbone.config.get_text_config()
        linear = [
            module.in_features * module.out_features  # not numel: quantized weights are packed
            for name, module in decoder.layers.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name
        ]
        heads = config.num_attention_heads
        width = get_head_width(config)
        return cls(
            num_layers=len(decoder.layers),
            layer_weights=sum(linear) // len(decoder.layers),
            attention_width=heads * width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
            hidden_size=config.hidden_size,
            vocabulary=backbone.get_output_embeddings().weight.shape[0],
        )

    def count_forward(self, tokens: int, pairs: int) -> int:
        """Return the FLOPs of a forward pass without the head.

        Args:
            tokens: positions computed.
            pairs: (query, key) pairs of attention, over all rows.
        """
        return self.num_layers * (2 * self.layer_weights * tokens + 4 * self.attention_width * pairs)

    def count_backward(self, tokens: int, pairs: int) -> int:
        """Return the FLOPs of the backward pass.

        Each matmul of the forward pass has one in the backward pass, and another if its weights train; in attention
        two, as both factors are activations.
        """
        matmuls = 4 if self.trains_layers else 2
        return self.num_layers * (matmuls * self.layer_weights * tokens + 8 * self.attention_width * pairs)

    def count_head(self, tokens: int) -> int:
        """Return the FLOPs of full-vocabulary logits."""
        return 2 * self.vocabulary * self.hidden_size * tokens


@dataclass(frozen=True)
class StepCost:
    """Cost of a set of rows.

    Attributes:
        tokens: positions of the forward pass.
        trained_tokens: positions of the backward pass.
        flops: FLOPs, forward and backward.
    """

    tokens: int
    trained_tokens: int
    flops: int

    def __add__(self, other: StepCost) -> StepCost:
        """Add two costs."""
        return StepCost(
            self.tokens + other.tokens, self.trained_tokens + other.trained_tokens, self.flops + other.flops
        )


def count_shared(shape: DecoderShape, batch: PromptBatch, *, training: bool, cached: bool = False) -> StepCost:
    """Return the cost of a micro-batch with shared contexts, without padding.

    Args:
        shape: the decoder's sizes.
        batch: the micro-batch.
        training: whether there is a backward pass, over the tree only.
        cached: whether the prefixes' keys and values are cached.
    """
    header, prefix = len(batch.header_ids), batch.prefix_lengths.numbers
    context_lengths = header + prefix[batch.prefix_rows.numbers]
    rows, targets = batch.tree_lengths.list_rows(), batch.tree_targets
    tails = torch.bincount(rows[targets < 0], minlength=len(context_lengths)).numpy()
    branches = torch.bincount(targets[targets >= 0], minlength=len(batch.last)).numpy()
    branch_contexts = (context_lengths + tails)[rows[batch.last].numpy()]  # tokens before each branch
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
    if titles := len(batch.title_places):
        # A pass without a history, and the logits of both, which training computes twice and differentiates.
        flops += shape.count_forward(titles, 0) + shape.count_head(titles) * (6 if training else 2)
        flops += shape.count_backward(titles, 0) if training else 0
    return StepCost((0 if cached else constant) + trained, trained * training, flops)


def count_padded(shape: DecoderShape, rows: int, width: int, *, training: bool, full_head: bool) -> StepCost:
    """Return the cost of padded rows.

    Args:
        shape: the decoder's sizes.
        rows, width: shape of the batch.
        training: whether there is a backward pass, over all positions.
        full_head: whether logits are computed at every position.
    """
    tokens, pairs = rows * width, rows * width * width
    head = shape.count_head(tokens if full_head else rows)
    flops = shape.count_forward(tokens, pairs) + head
    if training:
        flops += shape.count_backward(tokens, pairs) + head
    return StepCost(tokens, tokens * training, flops)
