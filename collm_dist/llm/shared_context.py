"""The shared-context forward pass: a context is computed once, its targets branch off it (exact, no approximation).

Two building blocks, used together by ``collm.CollmModel``:

* *Tree rows*: one row a context holds the context's tokens and then its targets one after the other. A mask keeps
  targets apart, position ids say where each token would stand in its own plain prompt.
* *Constant prefix*: tokens that nothing trainable feeds run without gradient, and the tree rows attend to their keys
  and values.

Both run without padding (``packed_attention``). Any causal decoder that computes attention from keys, a mask and
position ids gives the same hidden states this way as for one padded row a target.

Shapes: C tree rows, S prefixes, P prefix tokens, T tree tokens, M tokens without padding, D model width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collm_dist.llm.packed_attention import Masks, Past, find_layers, run_packed, spread


@dataclass(frozen=True)
class Prefix:
    """Keys and values of S constant prefixes.

    Attributes:
        layers: by layer, keys and values (S, heads, P, width), zero at padding.
        lengths: (S,) of the prefixes.
        header: what stands before them all: a prefix alone. None where nothing does.
        rows: (C,) the prefix of each tree row; None = one each.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    header: Prefix | None = None
    rows: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Tokens that a row sees, padding and header included: U + P."""
        return self.layers[0][0].shape[2] + (0 if self.header is None else self.header.num_columns)

    def list_past(self) -> list[tuple[Past, ...]]:
        """Return by layer what a row sees. Rows are taken one layer at a time: all at once they would fill memory."""
        before: list[tuple[Past, ...]] = [()] * len(self.layers) if self.header is None else self.header.list_past()
        return [
            (*first, Past(keys, values, self.rows)) for first, (keys, values) in zip(before, self.layers, strict=True)
        ]

    def find_visible(self) -> Tensor:
        """Return which of a row's past tokens are no padding: (C, U + P) bool, U of the header."""
        lengths = self.lengths if self.rows is None else self.lengths[self.rows]
        start = 0 if self.header is None else self.header.num_columns
        return torch.arange(self.num_columns, device=lengths.device) < start + lengths[:, None]


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
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, config: Any, dtype: torch.dtype, header: int = 0
) -> Masks:
    """Return what attention adds to its scores: 0 or minus infinity, (C, 1, Q, K).

    Args:
        allowed: (C, Q, K) bool.
        query_positions, key_positions: (C, Q), (C, K) position ids; a window is measured in them.
        config: the decoder's configuration.
        dtype: of the result.
        header: tokens of the header, which stand first among the keys.
    """

    def finish(visible: Tensor) -> Tensor:
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None]

    window = getattr(config, "sliding_window", None)
    if window is None:
        return Masks(finish(allowed), None, None)
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    starts = torch.arange(header, device=allowed.device)
    distance = starts[:, None] - starts[None, :]
    of_header = finish(((distance >= 0) & (distance < window))[None]) if header > window else None
    return Masks(finish(allowed), finish(allowed & near), of_header)


@torch.no_grad()
def run_prefix(
    decoder: nn.Module, embeds: Tensor, lengths: Tensor, places: Tensor | None = None, header: Prefix | None = None
) -> Prefix:
    """Run right-padded prefixes and return their keys and values.

    Args:
        decoder: the model below the language-modelling head.
        embeds: (S, P, D) input embeddings.
        lengths: (S,) of the prefixes.
        places: where in (S * P) the real tokens stand; without it the device is asked.
        header: what all of them begin with, computed before as a prefix alone.
    """
    start = 0 if header is None else header.num_columns
    columns = torch.arange(embeds.shape[1], device=embeds.device)
    if places is None:
        places = (columns < lengths[:, None]).flatten().nonzero()[:, 0]
    positions = start + columns[None]
    keys = torch.arange(start + embeds.shape[1], device=embeds.device)[None]
    masks = build_masks(positions[:, :, None] >= keys[:, None, :], positions, keys, decoder.config, embeds.dtype)
    if masks.window is None:
        # Tokens stand before the padding of their row, and so never see it: a causal kernel needs no mask.
        masks = Masks(None, None, None)
    positions = positions.expand(len(embeds), -1)
    # No hidden state is asked for; but quantized layers do not take nothing.
    one = places.new_zeros(1)
    past = [] if header is None else header.list_past()
    _, layers = run_packed(decoder, embeds, positions, places, masks, past=past, needed=one, record=True)
    return Prefix(layers, lengths, header)


def run_tree(
    decoder: nn.Module,
    embeds: Tensor,
    branches: Tensor,
    positions: Tensor,
    prefix: Prefix | None = None,
    places: Tensor | None = None,
    header: Tensor | None = None,
    needed: Tensor | None = None,
) -> Tensor:
    """Run tree rows, over a prefix or a header if there is one, and return their last hidden states.

    Args:
        decoder: the model below the language-modelling head.
        embeds: (C, T, D) input embeddings.
        branches, positions: (C, T) as in ``PromptBatch``.
        prefix: what ``run_prefix`` returned, with the rows' places in it.
        places: where in (C * T) the real tokens stand; without it the device is asked.
        header: (U, D) input embeddings of what all rows begin with, computed once.
        needed: (N,) where in (C * T) the tokens stand whose hidden states are asked for; None = all.

    Returns:
        (C, T, D), right where needed, zero at padding.
    """
    if places is None:
        places = (branches >= 0).flatten().nonzero()[:, 0]
    allowed, key_positions = build_allowed(branches), positions
    visible: Tensor | None = None
    if prefix is not None:
        visible = prefix.find_visible()
    elif header is not None:
        visible = torch.ones(1, len(header), dtype=torch.bool, device=embeds.device)
    if visible is not None:
        columns = torch.arange(visible.shape[1], device=embeds.device)
        allowed = torch.cat([visible[:, None, :].expand(*branches.shape, -1), allowed], dim=2)
        key_positions = torch.cat([columns.expand(len(positions), -1), positions], dim=1)
    start = 0 if header is None else len(header)
    masks = build_masks(allowed, positions, key_positions, decoder.config, embeds.dtype, start)
    past = [] if prefix is None else prefix.list_past()
    if needed is not None:
        needed = torch.searchsorted(places, needed)
    hidden, _ = run_packed(decoder, embeds, positions, places, masks, header, past, needed=needed)
    return spread(hidden, places, *branches.shape)


def enable_activation_checkpointing(decoder: nn.Module) -> None:
    """Make every decoder layer recompute its activations in the backward pass.

    Our own wrapper: transformers' knows nothing of what its layers are given here.
    """
    for layer in find_layers(decoder):
        plain_forward: Any = layer.forward
        layer.forward = functools.partial(_checkpointed, plain_forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
