"""The shared-context forward pass: a context is computed once, its targets branch off it (exact, no approximation).

Two building blocks, used together by ``collm.CollmModel``:

* *Tree rows*: one row a context holds the context's tokens and then its targets one after the other. A mask keeps
  targets apart, position ids say where each token would stand in its own plain prompt.
* *Constant prefix*: tokens that nothing trainable feeds run without gradient, and the tree rows attend to their keys
  and values.

Both run without padding (``packed_attention``). Any causal decoder that computes attention from keys, a mask and
position ids gives the same hidden states this way as for one padded row a target.

Shapes: C tree rows with M tokens in all, S prefixes with P tokens in all, U tokens of the header, D model width; a
block of R rows has T columns and K keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collm_dist.llm.packed.decoder import CHECKPOINTED, Parts, find_layers, prepare_decoder, run_packed
from collm_dist.llm.packed.row_blocks import BLOCK_COST, Masks, split_rows
from collm_dist.llm.packed.row_layout import Past, RowLayout, lay_out_rows
from collm_dist.llm.packed.sequences import SequenceLayout, lay_out_sequences, takes_sequences
from collm_dist.prompt_batch import TAIL, Mirrored, Segments

PADDING = -2


@dataclass(frozen=True)
class Prefix:
    """Keys and values of S constant prefixes.

    Attributes:
        layers: by layer, keys and values of all U + P tokens, the header's first.
        lengths: (S,) tokens of the prefixes.
        header: U, tokens that stand before them all.
        rows: (C,) the prefix of each tree row; None = one each.
    """

    layers: list[Parts]
    lengths: Mirrored
    header: int = 0
    rows: Mirrored | None = None

    def list_lengths(self) -> NDArray[np.int64]:
        """Return the (C,) lengths that the tree rows see, on the host."""
        return self.lengths.numbers if self.rows is None else self.lengths.numbers[self.rows.numbers]

    def list_past(self) -> Past:
        """Return what the tree rows see of it."""
        lengths, starts = self.lengths, self.header + self.lengths.list_starts()
        if self.rows is not None:
            lengths = Mirrored(self.list_lengths(), lengths.tensor[self.rows.tensor])
            starts = starts[self.rows.tensor]
        return Past(self.header + int(self.lengths.numbers.sum()), lengths, starts)


def build_allowed(targets: Tensor) -> Tensor:
    """Return which token may see which: (R, T, T) bool, [r, query, key].

    A key is seen if it stands before the query (or is it) and belongs to the tail or to the query's own target.
    Padding sees itself, since a softmax over nothing is NaN.

    Args:
        targets: (R, T) the target of each token, ``TAIL`` in a tail and -2 at padding.
    """
    query, key = targets[:, :, None], targets[:, None, :]
    columns = torch.arange(targets.shape[1], device=targets.device)
    return ((key == TAIL) | (key == query)) & (columns[:, None] >= columns[None, :])


def build_masks(
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, config: Any, dtype: torch.dtype
) -> Masks:
    """Return what attention adds to its scores: 0 or minus infinity, (R, 1, T, K).

    Args:
        allowed: (R, T, K) bool.
        query_positions, key_positions: (R, T), (R, K) position ids; a window is measured in them.
        config: the decoder's configuration.
        dtype: of the result.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return Masks(_finish(allowed, dtype))
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return Masks(_finish(allowed, dtype), _finish(allowed & near, dtype))


def _finish(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # Rows start at multiples of 8 numbers, or every layer would copy the mask: a GPU's kernels want that.
    rows, queries, keys = visible.shape
    room = torch.zeros(rows, queries, -(-keys // 8) * 8, dtype=dtype, device=visible.device)
    return room[..., :keys].masked_fill_(~visible, -torch.inf)[:, None]


def _build_header_mask(length: int, config: Any, like: Tensor) -> Tensor | None:
    """Return what attention adds within a header, if it is longer than the window."""
    window = getattr(config, "sliding_window", None)
    if window is None or length <= window:
        return None
    starts = torch.arange(length, device=like.device)
    distance = starts[:, None] - starts[None, :]
    return _finish(((distance >= 0) & (distance < window))[None], like.dtype)


def _find_block_cost(decoder: nn.Module, device: torch.device) -> int:
    """Return what a block costs, in comparisons."""
    config: Any = decoder.config
    heads: int = config.num_attention_heads
    width: int = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return BLOCK_COST.get(device.type, BLOCK_COST["cuda"]) // width


@torch.no_grad()
def run_prefix(decoder: nn.Module, embeds: Tensor, lengths: Mirrored, header: Prefix | None = None) -> Prefix:
    """Run prefixes and return their keys and values.

    Args:
        decoder: the model below the language-modelling head.
        embeds: (P, D) input embeddings.
        lengths: (S,) tokens of each.
        header: what all of them begin with, computed before as a prefix alone.
    """
    start = 0 if header is None else int(header.lengths.numbers[0])
    prepare_decoder(decoder)
    rows = lengths.list_rows()
    positions = start + torch.arange(len(rows), device=rows.device) - lengths.list_starts()[rows]
    layout = _lay_out_prefixes(decoder, embeds, lengths, start)
    # No hidden state is asked for; but quantized layers do not take nothing.
    one, past = rows.new_zeros(1), [] if header is None else header.layers
    _, found = run_packed(decoder, embeds, positions, layout, past=past, needed=one, record=True)
    return Prefix(
        [
            ((*keys, of_keys), (*values, of_values))
            for (keys, values), (of_keys, of_values) in zip(past or [((), ())] * len(found), found, strict=True)
        ],
        lengths,
        start,
    )


def _lay_out_prefixes(decoder: nn.Module, embeds: Tensor, lengths: Mirrored, header: int) -> RowLayout | SequenceLayout:
    """Return how prefixes are compared that stand behind a header computed before."""
    device, none = lengths.tensor.device, np.zeros_like(lengths.numbers)
    past = Past(header, Mirrored.of(none, device), torch.zeros_like(lengths.tensor)) if header else None
    if takes_sequences(decoder, embeds):
        rows = Mirrored.of(np.arange(len(lengths)), device)
        return lay_out_sequences(Segments(lengths, rows, Mirrored.of(none, device)), lengths, header, past)
    windowed = getattr(decoder.config, "sliding_window", None) is not None
    masks, spans = [], split_rows(lengths.numbers, none, header, _find_block_cost(decoder, device))
    for span in spans:
        if not windowed:
            # A causal kernel needs no mask: tokens stand before the padding of their row.
            masks.append(Masks(None))
            continue
        keys = torch.arange(header + span.columns, device=device)[None]
        queries = keys[:, header:]
        allowed = queries[:, :, None] >= keys[:, None, :]
        masks.append(build_masks(allowed, queries, keys, decoder.config, embeds.dtype))
    return lay_out_rows(lengths, spans, masks, header, past)


def run_tree(
    decoder: nn.Module,
    embeds: Tensor,
    targets: Tensor,
    positions: Tensor,
    lengths: Mirrored,
    prefix: Prefix | None = None,
    header: Tensor | None = None,
    needed: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Run tree rows, over a prefix or a header if there is one, and return their last hidden states.

    Args:
        decoder: the model below the language-modelling head.
        embeds: (M, D) input embeddings.
        targets, positions: (M,) as in ``PromptBatch``.
        lengths: (C,) tokens of each row.
        prefix: what ``run_prefix`` returned, with the rows' places in it.
        header: (U, D) input embeddings of what all rows begin with, computed once.
        needed: (N,) which tokens' hidden states are asked for; None = all.
        segments: the rows' tails and branches; without them rows are compared in blocks everywhere.

    Returns:
        (M, D), right where needed.
    """
    start = 0 if header is None else len(header)
    prepare_decoder(decoder)
    config: Any = decoder.config
    layout: RowLayout | SequenceLayout
    if segments is not None and takes_sequences(decoder, embeds):
        ahead, past = (start, None) if prefix is None else (prefix.header, prefix.list_past())
        layout = lay_out_sequences(segments, lengths, ahead, past)
    else:
        cost = _find_block_cost(decoder, embeds.device)
        layout = lay_out_tree(config, targets, positions, lengths, cost, embeds.dtype, prefix, start)
    return run_packed(
        decoder,
        embeds,
        positions,
        layout,
        header=header,
        header_mask=_build_header_mask(start, decoder.config, embeds),
        past=() if prefix is None else prefix.layers,
        needed=needed,
    )[0]


def lay_out_tree(
    config: Any,
    targets: Tensor,
    positions: Tensor,
    lengths: Mirrored,
    cost: int,
    dtype: torch.dtype,
    prefix: Prefix | None = None,
    header: int = 0,
) -> RowLayout:
    """Return the blocks in which attention compares tree rows.

    Args:
        config: the decoder's configuration.
        targets, positions, lengths, prefix: see ``run_tree``.
        cost: of a block, see ``split_rows``.
        dtype: of the masks.
        header: U, tokens that all rows begin with, where they are no prefix's.
    """
    ahead, pasts, past = header, np.zeros_like(lengths.numbers), None
    if prefix is not None:
        ahead, pasts, past = prefix.header, prefix.list_lengths(), prefix.list_past()
    starts, masks, spans = lengths.list_starts(), [], split_rows(lengths.numbers, pasts, ahead, cost)
    for span in spans:
        columns = torch.arange(span.columns, device=targets.device)
        is_token = columns < lengths.tensor[span.rows, None]
        tokens = (starts[span.rows, None] + columns) * is_token
        rows_targets, rows_positions = torch.where(is_token, targets[tokens], PADDING), positions[tokens] * is_token
        before = torch.arange(ahead + span.past, device=targets.device).expand(len(is_token), -1)
        visible = before >= 0 if past is None else before < ahead + past.lengths.tensor[span.rows, None]
        allowed = torch.cat([visible[:, None].expand(-1, span.columns, -1), build_allowed(rows_targets)], dim=2)
        key_positions = torch.cat([before, rows_positions], dim=1)
        masks.append(build_masks(allowed, rows_positions, key_positions, config, dtype))
    return lay_out_rows(lengths, spans, masks, ahead, past)


def enable_activation_checkpointing(decoder: nn.Module) -> None:
    """Make every decoder layer recompute its activations in the backward pass.

    Our own wrapper: transformers' knows nothing of what its layers are given here.
    """
    decoder.__dict__[CHECKPOINTED] = True
    for layer in find_layers(decoder):
        plain_forward: Any = layer.forward
        layer.forward = functools.partial(_checkpointed, plain_forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
