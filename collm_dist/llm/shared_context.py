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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collm_dist.llm.packed_attention import find_layers, prepare_decoder, run_packed
from collm_dist.llm.row_blocks import BLOCK_COST, Block, Masks, RowSpan, split_rows
from collm_dist.prompt_batch import TAIL, Mirrored

PADDING = -2


@dataclass(frozen=True)
class Prefix:
    """Keys and values of S constant prefixes.

    Attributes:
        layers: by layer, keys and values (1, heads, U + P, width), the header's first.
        lengths: (S,) tokens of the prefixes.
        header: U, tokens that stand before them all.
        rows: (C,) the prefix of each tree row; None = one each.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Mirrored
    header: int = 0
    rows: Mirrored | None = None

    def list_lengths(self) -> NDArray[np.int64]:
        """Return the (C,) lengths that the tree rows see, on the host."""
        return self.lengths.numbers if self.rows is None else self.lengths.numbers[self.rows.numbers]

    def choose(self, span: RowSpan) -> tuple[Tensor, Tensor]:
        """Return which tokens the rows of a span see, and which of these are no padding: (R, U + span.past) each."""
        lengths, starts = self.lengths.tensor, self.lengths.list_starts()
        if self.rows is not None:
            lengths, starts = lengths[self.rows.tensor], starts[self.rows.tensor]
        columns = torch.arange(self.header + span.past, device=lengths.device)
        visible = columns < self.header + lengths[span.rows, None]
        chosen = columns + torch.where(columns < self.header, 0, starts[span.rows, None])
        return chosen * visible, visible


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
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, config: Any, dtype: torch.dtype, groups: int = 1
) -> Masks:
    """Return what attention adds to its scores: 0 or minus infinity, (R, 1, groups * T, K).

    Args:
        allowed: (R, T, K) bool.
        query_positions, key_positions: (R, T), (R, K) position ids; a window is measured in them.
        config: the decoder's configuration.
        dtype: of the result.
        groups: how often they are repeated, see ``Masks``.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return Masks(_finish(allowed, dtype, groups))
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return Masks(_finish(allowed, dtype, groups), _finish(allowed & near, dtype, groups))


def _find_groups(decoder: Any, device: torch.device) -> int:
    """Return how many query heads lay their queries end to end; where kernels do it by themselves, one."""
    config = decoder.config
    softcap = getattr(config, "attn_logit_softcapping", None)
    if device.type == "cpu" or decoder.__dict__["_runs_packed"] or softcap is not None:
        return 1
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def _finish(visible: Tensor, dtype: torch.dtype, groups: int = 1) -> Tensor:
    visible = visible.repeat(1, groups, 1)
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


def _lay_out(lengths: Mirrored, spans: list[RowSpan]) -> Iterator[tuple[RowSpan, Tensor, Tensor | None, Tensor | None]]:
    """Yield each span with its (R, T) bool ``is_token``, ``places`` and ``sources``; see ``Block``."""
    rows = lengths.list_rows()
    columns = torch.arange(len(rows), device=rows.device) - lengths.list_starts()[rows]
    for span in spans:
        is_token = torch.arange(span.columns, device=rows.device) < lengths.tensor[span.rows, None]
        places = (rows[span.tokens] - span.rows.start) * span.columns + columns[span.tokens]
        if is_token.numel() == len(places):
            yield span, is_token, None, None
            continue
        sources = torch.zeros(is_token.numel(), dtype=torch.int64, device=rows.device)
        yield span, is_token, places, sources.index_copy_(0, places, torch.arange(len(places), device=rows.device))


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
    rows = lengths.list_rows()
    positions = start + torch.arange(len(rows), device=rows.device) - lengths.list_starts()[rows]
    windowed = getattr(decoder.config, "sliding_window", None) is not None
    cost = _find_block_cost(decoder, rows.device)
    blocks, spans = [], split_rows(lengths.numbers, np.zeros_like(lengths.numbers), start, cost)
    for span, is_token, places, sources in _lay_out(lengths, spans):
        masks = Masks(None)
        if windowed:
            keys = torch.arange(start + span.columns, device=rows.device)[None]
            queries = keys[:, start:]
            masks = build_masks(queries[:, :, None] >= keys[:, None, :], queries, keys, decoder.config, embeds.dtype)
        # Without a window a causal kernel needs no mask: tokens stand before the padding of their row.
        blocks.append(Block(is_token, places, sources, masks))
    sizes = [span.tokens.stop - span.tokens.start for span in spans]
    # No hidden state is asked for; but quantized layers do not take nothing.
    one, past = rows.new_zeros(1), () if header is None else header.layers
    _, layers = run_packed(decoder, embeds, positions, blocks, sizes, past=past, needed=one, record=True)
    return Prefix(layers, lengths, start)


def run_tree(
    decoder: nn.Module,
    embeds: Tensor,
    targets: Tensor,
    positions: Tensor,
    lengths: Mirrored,
    prefix: Prefix | None = None,
    header: Tensor | None = None,
    needed: Tensor | None = None,
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

    Returns:
        (M, D), right where needed.
    """
    start = 0 if header is None else len(header)
    cost = _find_block_cost(decoder, embeds.device)
    prepare_decoder(decoder)
    groups, config, dtype = _find_groups(decoder, embeds.device), decoder.config, embeds.dtype
    blocks, sizes = lay_out_tree(config, targets, positions, lengths, cost, dtype, prefix, start, groups)
    return run_packed(
        decoder,
        embeds,
        positions,
        blocks,
        sizes,
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
    groups: int = 1,
) -> tuple[list[Block], list[int]]:
    """Return the blocks in which attention compares tree rows, and how many tokens are in each.

    Args:
        config: the decoder's configuration.
        targets, positions, lengths, prefix: see ``run_tree``.
        cost: of a block, see ``split_rows``.
        dtype: of the masks.
        header: U, tokens that all rows begin with, where they are no prefix's.
        groups: of query heads, see ``Masks``.
    """
    ahead, pasts = header, np.zeros_like(lengths.numbers)
    if prefix is not None:
        ahead, pasts = prefix.header, prefix.list_lengths()
    device = targets.device
    blocks, spans = [], split_rows(lengths.numbers, pasts, ahead, cost)
    for span, is_token, places, sources in _lay_out(lengths, spans):
        rows_targets = torch.full(is_token.shape, PADDING, device=device)
        rows_targets = rows_targets.masked_scatter(is_token, targets[span.tokens])
        rows_positions = torch.zeros_like(rows_targets).masked_scatter(is_token, positions[span.tokens])
        allowed, past = build_allowed(rows_targets), None
        if prefix is not None:
            past, visible = prefix.choose(span)
        else:
            visible = torch.ones(len(is_token), header, dtype=torch.bool, device=device)
        allowed = torch.cat([visible[:, None].expand(-1, span.columns, -1), allowed], dim=2)
        columns = torch.arange(visible.shape[1], device=device).expand(len(is_token), -1)
        key_positions = torch.cat([columns, rows_positions], dim=1)
        masks = build_masks(allowed, rows_positions, key_positions, config, dtype, groups)
        blocks.append(Block(is_token, places, sources, masks, past))
    return blocks, [span.tokens.stop - span.tokens.start for span in spans]


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
