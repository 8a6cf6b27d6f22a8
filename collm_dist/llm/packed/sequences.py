"""Attention of packed tokens as sequences of unequal lengths, by a kernel that PyTorch has for GPUs.

Every tail and every branch is a sequence of queries. Its keys are what its plain prompt holds up to its end: header,
prefix, tail, and itself. Aligned at their ends, queries see the keys up to their own place, and within a window as in
the plain prompt. So nothing is padded, no mask is made, and a layer's attention is one call, however unlike rows are.
Keys that several sequences see are copied for each; the gradients of the copies are added up.

Shapes: S sequences; M packed tokens, U of them the header's if that is packed, m the others; A tokens ahead of the m;
K places of keys; H query heads, G key/value heads, W width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from collm_dist.llm.packed.packing import Copies
from collm_dist.llm.packed.row_layout import Past
from collm_dist.prompt_batch import Mirrored, Segments

# FlashAttention's, as PyTorch has it (Dao, arXiv 2307.08691).
DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY, WIDEST_HEAD, WIDTH_STEP = (8, 0), 256, 8


@dataclass(frozen=True)
class SequenceLayout:
    """How packed tokens are compared.

    Attributes:
        query_ends, key_ends: (S + 1,) int32, where each sequence's queries and keys end; zero first.
        longest_queries, longest_keys: of a sequence.
        keys: (K,) which of the A + m tokens' keys stands at each place.
        key_places: where those of the m stand; None where nothing needs a gradient.
        header_places: (S, U) where the header's keys stand in each sequence; None where they need no gradient.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int
    keys: Tensor
    key_places: Copies | None
    header_places: Tensor | None


def takes_sequences(decoder: Any, embeds: Tensor) -> bool:
    """Return whether the kernel can compare a decoder's tokens; not on older GPUs, nor in float32."""
    if not embeds.is_cuda or embeds.dtype not in DTYPES or decoder.__dict__["_runs_packed"]:
        return False
    config = decoder.config
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        getattr(config, "attn_logit_softcapping", None) is None
        and width <= WIDEST_HEAD
        and width % WIDTH_STEP == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(embeds.device) >= LEAST_CAPABILITY
    )


def lay_out_sequences(segments: Segments, lengths: Mirrored, header: int, past: Past | None = None) -> SequenceLayout:
    """Return the layout of rows.

    Args:
        segments: of the m tokens.
        lengths: (C,) tokens of each row.
        header: U.
        past: None = the header, if there is one, is packed itself, before the rows.
    """
    own, tails, rows, device = segments.lengths, segments.tails, segments.rows, lengths.tensor.device
    ahead = header if past is None else past.tokens
    seen = Mirrored.of(np.full(len(own), header), device)
    if past is not None:
        before = past.lengths
        seen = Mirrored(header + before.numbers[rows.numbers], header + before.tensor[rows.tensor])
    counts = Mirrored(seen.numbers + tails.numbers + own.numbers, seen.tensor + tails.tensor + own.tensor)
    sequences, starts = counts.list_rows(), counts.list_starts()
    columns = torch.arange(len(sequences), device=device) - starts[sequences]
    # From the column where each part begins on: where it stands among the A + m, less its column.
    of_tail = ahead + lengths.list_starts()[rows.tensor] - seen.tensor
    of_own = ahead + own.list_starts() - seen.tensor - tails.tensor
    parts = [(seen.tensor, of_tail), (seen.tensor + tails.tensor, of_own)]
    if past is not None:
        parts.insert(0, (torch.full_like(seen.tensor, header), past.starts[rows.tensor] - header))
    keys = columns
    for first, shift in parts:
        keys = torch.where(columns >= first[sequences], columns + shift[sequences], keys)
    queries, num_ahead, header_places = own, int(seen.numbers.sum()), None
    if header and past is None:
        shared = torch.arange(header, device=device)
        keys, num_ahead = torch.cat([shared, keys]), header + num_ahead
        header_places = pad(header + starts, (1, 0))[:, None] + shared
        queries, counts = _begin_with(header, queries), _begin_with(header, counts)
    return SequenceLayout(
        _list_ends(queries),
        _list_ends(counts),
        int(queries.numbers.max()),
        int(counts.numbers.max()),
        keys,
        _find_copies(keys, num_ahead, ahead, int(own.numbers.sum())) if torch.is_grad_enabled() else None,
        header_places,
    )


def _begin_with(length: int, lengths: Mirrored) -> Mirrored:
    return Mirrored(np.concatenate([[length], lengths.numbers]), pad(lengths.tensor, (1, 0), value=length))


def _list_ends(lengths: Mirrored) -> Tensor:
    return pad(lengths.tensor.cumsum(0), (1, 0)).int()


def _find_copies(keys: Tensor, num_ahead: int, ahead: int, count: int) -> Copies:
    """Return where the keys of the m packed tokens stand.

    Args:
        keys: (K,) as in ``SequenceLayout``.
        num_ahead: places of the A tokens' keys.
        ahead: A.
        count: m.
    """
    ranked, order = keys.sort(stable=True)
    starts = torch.searchsorted(ranked[num_ahead:], ahead + torch.arange(count, device=keys.device))
    return Copies(order[num_ahead:], starts)


def compare_sequences(
    layout: SequenceLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Return what queries find: (M, H, W), and (K, G, W) twice -> (M, H, W).

    Args:
        layout: of the tokens.
        query: of the packed tokens.
        key, value: at their places.
        scaling: of scores.
        dropout: of shares.
        window: how far a token sees, itself included; None = all that stands before it.
    """
    # What PyTorch offers for it in the open, torch.nn.attention.varlen, takes no dropout, and other arguments in each
    # release; this is what it calls.
    found: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        layout.longest_queries,
        layout.longest_keys,
        dropout,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return found
