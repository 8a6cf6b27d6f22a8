"""Attention over packed tokens, called by transformers through its attention interface.

``PackedDecoder`` sets ``ATTENTION`` as a decoder's attention implementation. A pass with a ``LayerLayout`` lays out the
packed queries, keys and values in cells, attends there, and packs the output again; a pass without one is attention of
plain padded rows.

Shapes: M packed tokens, U of them in the header; A tokens of a past; a block has R rows, T columns and K keys; L key
cells; H query heads, G key/value heads, W width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from collm_dist.errors import ConfigError
from collm_dist.llm.packed.packing import RecomputedCells, gather, lay_out, recompute_in_backward
from collm_dist.llm.packed.row_blocks import RowLayout
from collm_dist.llm.packed.sequences import MAX_HEAD_WIDTH, SequenceLayout

ATTENTION = "collm_packed"

# A layer's keys and its values, each in parts that stand one after the other, (a, G, W).
KeyValues = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
# (R, H, T, W), (R, G, K, W) twice and a mask -> (R, H, T, W).
_BlockAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class LayerLayout:
    """Layout of a layer's packed tokens, and what they attend to.

    Attributes:
        tokens: their cells in blocks, or their sequences.
        header: U.
        header_mask: (1, 1, U, U) for layers whose sliding window is shorter than the header; None otherwise.
        past: keys and values of earlier tokens. There is never both a past and a packed header.
        needed: (N,) index of the tokens whose last hidden states are needed; None = all.
        record: whether to record keys and values.
        recorded: keys and values of the packed tokens, (M, G, W) each.
        eager: attend step by step instead of by PyTorch's fused kernels.
        recomputed: the whole layer is recomputed in the backward pass; set by the layer.
    """

    tokens: RowLayout | SequenceLayout
    header: int = 0
    header_mask: Tensor | None = None
    past: KeyValues | None = None
    needed: Tensor | None = None
    record: bool = False
    recorded: tuple[Tensor, Tensor] | None = None
    eager: bool = False
    recomputed: bool = False


@dataclass(frozen=True)
class _Options:
    """A layer's settings of its attention."""

    scaling: float | None
    dropout: float
    softcap: float | None
    window: int | None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: LayerLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, with transformers' signature: (1, H, M, W), (1, G, M, W) twice -> (1, M, H, W)."""
    options = _Options(scaling, dropout, softcap, sliding_window)
    if layout is None:
        return _attend_padded_rows(module, query, key, value, attention_mask, options, kwargs)
    if kwargs.get("s_aux") is not None:
        raise ConfigError("llm.backbone: attention sinks are not supported; choose another backbone")
    # (M, heads, W), as the projections compute them.
    query, key, value = (heads.transpose(1, 2).squeeze(0) for heads in (query, key, value))
    if layout.record:
        layout.recorded = key, value
    if isinstance(layout.tokens, RowLayout):
        return _attend_in_blocks(layout, layout.tokens, query, key, value, options)[None], None
    if softcap is not None or key.shape[-1] != value.shape[-1] or key.shape[-1] > MAX_HEAD_WIDTH:
        raise ConfigError(
            f"llm.backbone: the FlashAttention kernel does not support the attention of {type(module).__name__}; set "
            "llm.attention=eager"
        )
    return _attend_in_sequences(layout, layout.tokens, query, key, value, options)[None], None


def _attend_in_sequences(
    layout: LayerLayout, sequences: SequenceLayout, query: Tensor, key: Tensor, value: Tensor, options: _Options
) -> Tensor:
    """(M, H, W), (M, G, W) twice -> (M, H, W)."""
    divided = [_divide(packed, layout.header) for packed in (key, value)]
    (keys, values), sources = _lay_out_keys(layout, (key, value), divided)
    with recompute_in_backward(*sources):
        return sequences.kernel(
            sequences, query, keys, values, scaling=options.scaling, dropout=options.dropout, window=options.window
        )


def _attend_in_blocks(
    layout: LayerLayout, rows: RowLayout, query: Tensor, key: Tensor, value: Tensor, options: _Options
) -> Tensor:
    """(M, H, W), (M, G, W) twice -> (M, H, W)."""
    function = _attend_stepwise if layout.eager or options.softcap is not None else _attend_fused
    attend: _BlockAttention = functools.partial(function, options=options)
    outputs: list[Tensor] = []
    (query_header, queries), *divided = (_divide(packed, layout.header) for packed in (query, key, value))
    if query_header is not None:
        # Copies: the backward pass would otherwise keep the whole tensors for the sake of a part.
        headers = [query_header, *(header for header, _ in divided if header is not None)]
        query_heads, key_heads, value_heads = (part.transpose(0, 1)[None].contiguous() for part in headers)
        mask = layout.header_mask if options.window is not None else None
        outputs.append(attend(query_heads, key_heads, value_heads, mask).transpose(1, 2).flatten(0, 1))
    (keys, values), sources = _lay_out_keys(layout, (key, value), divided)
    queries = lay_out(queries, rows.query_tokens, rows.query_cells)
    with recompute_in_backward(*sources):
        outputs += _attend_to_blocks(rows, queries, keys, values, attend, windowed=options.window is not None)
    return gather(outputs[0] if len(outputs) == 1 else torch.cat(outputs), rows.output_cells)


def _divide(packed: Tensor, header: int) -> tuple[Tensor | None, Tensor]:
    """Return the header's part of packed tokens, None if no header is packed, and the rest."""
    return tuple(torch.split(packed, [header, len(packed) - header])) if header else (None, packed)  # type: ignore[return-value]


def _lay_out_keys(
    layout: LayerLayout, packed: Sequence[Tensor], divided: Sequence[tuple[Tensor | None, Tensor]]
) -> tuple[list[Tensor], list[RecomputedCells]]:
    """Return keys and values in their cells, and the sources of those not to keep for the backward pass.

    Args:
        layout: of the layer.
        packed: keys and values, (M, G, W) each.
        divided: the same, divided into header and rest.
    """
    tokens, laid_out, sources = layout.tokens, [], []
    for index, (whole, (header, rest)) in enumerate(zip(packed, divided, strict=True)):
        parts = (*(layout.past[index] if layout.past is not None else ()), whole.detach())
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        cells = lay_out(
            rest, tokens.key_tokens, tokens.key_cells, whole=joined, header=header, header_cells=tokens.header_cells
        )
        laid_out.append(cells)
        sources.append(RecomputedCells(cells, parts, tokens.key_tokens))
    # In blocks, a header alone is copied for few rows; sequences have many copies of everything that is shared.
    worthwhile = layout.past is not None or isinstance(tokens, SequenceLayout)
    return laid_out, sources if worthwhile and not layout.recomputed else []


def _attend_to_blocks(
    rows: RowLayout, queries: Tensor, keys: Tensor, values: Tensor, attend: _BlockAttention, *, windowed: bool
) -> Iterator[Tensor]:
    """Yield the (R T, H, W) output of each block.

    Args:
        rows: the blocks.
        queries, keys, values: in their cells.
        attend: attends within a block.
        windowed: whether the layer has a sliding window.
    """
    block_queries = torch.split(queries, [block.rows * block.columns for block in rows.blocks])
    block_keys, block_values = (
        torch.split(cells, [block.rows * block.keys for block in rows.blocks]) for cells in (keys, values)
    )
    for block, *cells in zip(rows.blocks, block_queries, block_keys, block_values, strict=True):
        query, key, value = (part.view(block.rows, -1, *part.shape[1:]).transpose(1, 2) for part in cells)
        mask = block.masks.window if windowed and block.masks.window is not None else block.masks.plain
        num_padded = 0
        if mask is None:
            # Causal kernels need as many queries as keys.
            num_padded = block.keys - block.columns
            query = pad(query, (0, 0, num_padded, 0))
        output = attend(query, key, value, mask)[:, :, num_padded:]
        yield output.transpose(1, 2).flatten(0, 1)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Attend by PyTorch's fastest kernel; without a mask each query attends to the keys up to its own position.

    Fused kernels take fewer key heads than query heads, but not those for GPUs with a mask.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None and query.device.type != "cpu":
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=mask is None,
        scale=options.scaling,
        enable_gqa=groups > 1,
    )


def _attend_stepwise(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Attend step by step, with the soft cap that some models put on scores (Gemma 2)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = query @ key.transpose(2, 3) * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    weights = (scores + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return drop(weights, options.dropout) @ value


def _attend_padded_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: _Options,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attend in a pass that is not ours."""
    if mask is not None and mask.shape[-1] < key.shape[2]:
        raise ConfigError(
            f"llm.backbone: {type(module).__name__} does not pass its arguments to its attention, so contexts cannot "
            "be shared; choose another backbone"
        )
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module,
        query,
        key,
        value,
        mask,
        dropout=options.dropout,
        scaling=options.scaling,
        softcap=options.softcap,
        **kwargs,
    )


# Compiled code would be rebuilt for each number of blocks, so a compiled layer ends before attention and begins again
# after it.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_attend))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
