"""The shared-context forward pass: a context is computed once, its targets branch off it (exact, no approximation).

Two building blocks, used together by ``collm.CollmModel``:

* *Tree rows*: one row a context holds the context's tokens and then its targets one after the other. A 4-D mask keeps
  targets apart, position ids say where each token would stand in its own plain prompt.
* *Constant prefix*: tokens that nothing trainable feeds run without gradient into a cache of keys and values, and the
  tree rows attend to it.

Any causal decoder that computes attention from keys, a mask and position ids gives the same hidden states this way as
for one padded row a target.

Shapes: C contexts, P prefix tokens, T tree tokens, D model width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

AttentionMask = Tensor | dict[str, Tensor]


class FrozenCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of a prefix that layers read but never extend, so that a recomputed layer sees the same ones."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Return the prefix's keys and values followed by the given ones; nothing is stored."""
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    def take_rows(self, rows: Tensor) -> FrozenCache:
        """Return the cache of these rows; one may come several times."""
        taken = FrozenCache()
        for layer in self.layers:
            copied = DynamicLayer()
            copied.lazy_initialization(layer.keys, layer.values)
            copied.keys, copied.values = layer.keys[rows], layer.values[rows]
            taken.layers.append(copied)
        return taken


def build_allowed(tree_branches: Tensor) -> Tensor:
    """Return which tree token may see which: (C, T, T) bool, [c, query, key].

    A key is seen if it stands before the query (or is it) and belongs to the context or to the query's own branch.
    Padding sees itself, since a softmax over nothing is NaN.
    """
    num_tokens = tree_branches.shape[1]
    query, key = tree_branches[:, :, None], tree_branches[:, None, :]
    columns = torch.arange(num_tokens, device=tree_branches.device)
    causal = columns[:, None] >= columns[None, :]
    same = torch.eye(num_tokens, dtype=torch.bool, device=tree_branches.device)
    return ((key >= 0) & ((key == 0) | (key == query)) & causal) | same


def build_masks(
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, config: Any, dtype: torch.dtype
) -> AttentionMask:
    """Return the attention mask that the decoder expects, sliding windows included.

    Args:
        allowed: (C, Q, K) bool.
        query_positions, key_positions: (C, Q), (C, K) position ids; a window is measured in them.
        config: the decoder's configuration.
        dtype: of the additive mask (eager attention); SDPA gets booleans.

    Returns:
        (C, 1, Q, K), or a mask for each attention type where the decoder's layers differ.
    """

    def finish(visible: Tensor) -> Tensor:
        visible = visible[:, None]
        if config._attn_implementation != "eager":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if window is None or (layer_types and "sliding_attention" not in layer_types):
        return finish(allowed)
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    if not layer_types or layer_types == {"sliding_attention"}:
        return finish(allowed & near)
    return {"full_attention": finish(allowed), "sliding_attention": finish(allowed & near)}


@torch.no_grad()
def run_prefix(decoder: nn.Module, embeds: Tensor, lengths: Tensor) -> FrozenCache:
    """Run right-padded prefixes (C, P, D) of the given lengths (C,) and return their keys and values."""
    num_contexts, num_tokens, _ = embeds.shape
    columns = torch.arange(num_tokens, device=embeds.device)
    positions = columns.expand(num_contexts, -1)
    allowed = (columns[:, None] >= columns[None, :]).expand(num_contexts, -1, -1)
    # A plain cache, not one made from the configuration: that one drops keys outside a sliding window by column, but
    # columns are padded here and the mask above already limits the window by position.
    cache = DynamicCache()
    mask = build_masks(allowed, positions, positions, decoder.config, embeds.dtype)
    decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    frozen = FrozenCache()
    frozen.layers = cache.layers
    return frozen


def run_tree(
    decoder: nn.Module,
    embeds: Tensor,
    branches: Tensor,
    positions: Tensor,
    prefix: FrozenCache | None = None,
    prefix_lengths: Tensor | None = None,
) -> Tensor:
    """Run tree rows, over a prefix if there is one, and return their last hidden states.

    Args:
        decoder: the model below the language-modelling head.
        embeds: (C, T, D) input embeddings.
        branches, positions: (C, T) as in ``PromptBatch``.
        prefix, prefix_lengths: what ``run_prefix`` returned, and the (C,) lengths.

    Returns:
        (C, T, D).
    """
    allowed, key_positions = build_allowed(branches), positions
    if prefix is not None and prefix_lengths is not None:
        prefix_columns = torch.arange(prefix.layers[0].keys.shape[-2], device=embeds.device)
        visible = prefix_columns[None, :] < prefix_lengths[:, None]
        allowed = torch.cat([visible[:, None, :].expand(-1, embeds.shape[1], -1), allowed], dim=2)
        key_positions = torch.cat([prefix_columns.expand(len(positions), -1), positions], dim=1)
    mask = build_masks(allowed, positions, key_positions, decoder.config, embeds.dtype)
    output = decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=prefix, use_cache=False
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def enable_activation_checkpointing(decoder: nn.Module) -> None:
    """Make every decoder layer recompute its activations in the backward pass.

    Our own wrapper, because transformers' takes the cache away from a checkpointed layer; a ``FrozenCache`` can be read
    again without harm.
    """
    for layer in decoder.layers:  # type: ignore[union-attr]
        plain_forward = layer.forward
        layer.forward = functools.partial(_checkpointed, plain_forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
