"""Variable-length sequences: attention of packed tokens without padding, by PyTorch's FlashAttention kernel for GPUs.

Every tail and every branch is a sequence of queries. Its keys are those of its plain prompt up to its end: header,
prefix, tail, and itself. Aligned at their ends, queries attend to the keys up to their own position, and within a
window as in the plain prompt. So nothing is padded, there is no mask, and a layer's attention is one call, however
different the lengths are. Keys that several sequences attend to are copied for each; the gradients of the copies are
summed.

Shapes: S sequences; M packed tokens, U of them the header's if it is packed, m the others; A earlier tokens before the
m; L key cells; H query heads, G key/value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from collm_dist.llm.packed.packing import Copies
from collm_dist.llm.packed.row_blocks import Past, get_head_width
from collm_dist.prompt_batch import Mirrored, Segments

# Limits of FlashAttention (Dao, arXiv 2307.08691) as PyTorch ships it.
_DTYPES = (torch.bfloat16, torch.float16)
_MIN_CAPABILITY, MAX_HEAD_WIDTH, _HEAD_WIDTH_STEP = (8, 0), 256, 8


@dataclass(frozen=True)
class SequenceLayout:
    """Sequences of packed tokens.

    Attributes:
        query_ends, key_ends: (S + 1,) int32, ends of each sequence's queries and keys; zero first.
        max_queries, max_keys: of a sequence.
        key_tokens: (L,) token, among the A + m, of each key cell.
        key_cells: cells of the m; None where nothing needs a gradient.
        header_cells: (S, U) cells of the header's keys in each sequence; None where they need no gradient.
        kernel: computes the attention.
    """

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int
    key_tokens: Tensor
    key_cells: Copies | None
    header_cells: Tensor | None
    kernel: Callable[..., Tensor]


def flash_attention(
    layout: SequenceLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attend within sequences: (M, H, W), and (L, G, W) twice -> (M, H, W).

    Args:
        layout: of the tokens.
        query: of the packed tokens.
        key, value: in their cells.
        scaling: of scores.
        dropout: of attention weights.
        window: number of tokens that a token attends to, itself included; None = all before it.
    """
    # The public interface, torch.nn.attention.varlen, has no dropout and changes its arguments between releases; this
    # is the operator that it calls.
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        layout.max_queries,
        layout.max_keys,
        dropout,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return attended


@dataclass(frozen=True)
class Sequences:
    """Attention of variable-length sequences.

    Attributes:
        kernel: ``flash_attention``, or a function of its arguments that runs elsewhere.
    """

    kernel: Callable[..., Tensor] = flash_attention


def supports_sequences(config: Any, embeds: Tensor) -> bool:
    """Return whether the kernel can run a decoder's attention; not on older GPUs, nor in float32.

    Args:
        config: the decoder's.
        embeds: its input, for device and precision.
    """
    if not embeds.is_cuda or embeds.dtype not in _DTYPES:
        return False
    width = get_head_width(config)
    return (
        getattr(config, "attn_logit_softcapping", None) is None
        and width <= MAX_HEAD_WIDTH
        and width % _HEAD_WIDTH_STEP == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(embeds.device) >= _MIN_CAPABILITY
    )


def lay_out_sequences(
    segments: Segments,
    lengths: Mirrored,
    header: int,
    past: Past | None = None,
    kernel: Callable[..., Tensor] = flash_attention,
) -> SequenceLayout:
    """Return the layout of rows as sequences.

    Args:
        segments: of the m tokens.
        lengths: (C,) tokens of each row.
        header: U.
        past: None = the header, if there is one, is packed itself, before the rows.
        kernel: computes the attention.
    """
    queries, tails, rows, device = segments.lengths, segments.tails, segments.rows, lengths.tensor.device
    num_earlier = header if past is None else past.num_tokens
    # Keys of each sequence: header and prefix, then the row's tail, then itself.
    context = Mirrored.of(np.full(len(queries), header), device)
    if past is not None:
        prefix = past.lengths
        context = Mirrored(header + prefix.numbers[rows.numbers], header + prefix.tensor[rows.tensor])
    counts = Mirrored(context.numbers + tails.numbers + queries.numbers, context.tensor + tails.tensor + queries.tensor)
    sequences, starts = counts.list_rows(), counts.list_starts()
    columns = torch.arange(len(sequences), device=device) - starts[sequences]
    # Each part as (column of its first key, index of a key among the A + m less its column).
    tail_shift = num_earlier + lengths.list_starts()[rows.tensor] - context.tensor
    segment_shift = num_earlier + queries.list_starts() - context.tensor - tails.tensor
    parts = [(context.tensor, tail_shift), (context.tensor + tails.tensor, segment_shift)]
    if past is not None:
        parts.insert(0, (torch.full_like(context.tensor, header), past.starts[rows.tensor] - header))
    key_tokens = columns
    for first_column, shift in parts:
        key_tokens = torch.where(columns >= first_column[sequences], columns + shift[sequences], key_tokens)
    num_context, num_packed, header_cells = int(context.numbers.sum()), int(queries.numbers.sum()), None
    if header and past is None:
        header_tokens = torch.arange(header, device=device)
        key_tokens, num_context = torch.cat([header_tokens, key_tokens]), header + num_context
        header_cells = pad(header + starts, (1, 0))[:, None] + header_tokens
        queries, counts = _prepend(header, queries), _prepend(header, counts)
    return SequenceLayout(
        _list_ends(queries),
        _list_ends(counts),
        int(queries.numbers.max()),
        int(counts.numbers.max()),
        key_tokens,
        _find_copies(key_tokens, num_context, num_earlier, num_packed) if torch.is_grad_enabled() else None,
        header_cells,
        kernel,
    )


def _prepend(length: int, lengths: Mirrored) -> Mirrored:
    return Mirrored(np.concatenate([[length], lengths.numbers]), pad(lengths.tensor, (1, 0), value=length))


def _list_ends(lengths: Mirrored) -> Tensor:
    return pad(lengths.tensor.cumsum(0), (1, 0)).int()


def _find_copies(key_tokens: Tensor, num_context: int, num_earlier: int, count: int) -> Copies:
    """Return the key cells of the m packed tokens.

    Args:
        key_tokens: (L,) as in ``SequenceLayout``.
        num_context: cells of the A earlier tokens.
        num_earlier: A.
        count: m.
    """
    ranked, order = key_tokens.sort(stable=True)
    starts = torch.searchsorted(ranked[num_context:], num_earlier + torch.arange(count, device=key_tokens.device))
    return Copies(order[num_context:], starts)
