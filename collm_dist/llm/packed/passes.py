"""The shared-context forward pass: a context is computed once, and its targets branch off it.

Its two building blocks, used together by ``collm.CollmModel``:

* *Tree rows* (``run_tree``): a row holds a context's tokens and then its targets one after the other. A mask keeps
  targets apart; position ids are those of each token in its own plain prompt.
* *Constant prefix* (``run_prefix``): tokens before everything trainable run without gradient, and the tree rows attend
  to their keys and values.

Both run without padding (``PackedDecoder``), and are exact: any causal decoder that computes attention from keys, a
mask and position ids gives the same hidden states this way as from one padded row a target.

Shapes: C tree rows with M tokens in all, S prefixes with P tokens in all, U tokens of the header, D model width; a
block of R rows has T columns and K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.llm.packed.attention import KeyValues
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.row_blocks import Masks, PaddedBlocks, Past, RowLayout, lay_out_rows, split_rows
from collm_dist.llm.packed.sequences import SequenceLayout, Sequences, flash_attention, lay_out_sequences
from collm_dist.prompt_batch import TAIL, Mirrored, Segments

PADDING = -2  # the target of a padding cell


@dataclass(frozen=True)
class Prefix:
    """Keys and values of S constant prefixes.

    Attributes:
        layers: by layer, keys and values of all U + P tokens, the header's first.
        lengths: (S,) tokens of the prefixes.
        header: U, tokens before all of them.
        rows: (C,) the prefix of each tree row; None = the row's own.
    """

    layers: list[KeyValues]
    lengths: Mirrored
    header: int = 0
    rows: Mirrored | None = None

    def list_lengths(self) -> NDArray[np.int64]:
        """Return the (C,) lengths of the tree rows' prefixes, on the host."""
        return self.lengths.numbers if self.rows is None else self.lengths.numbers[self.rows.numbers]

    def list_past(self) -> Past:
        """Return the part that each tree row attends to."""
        lengths, starts = self.lengths, self.header + self.lengths.list_starts()
        if self.rows is not None:
            lengths = Mirrored(self.list_lengths(), lengths.tensor[self.rows.tensor])
            starts = starts[self.rows.tensor]
        return Past(self.header + int(self.lengths.numbers.sum()), lengths, starts)


@torch.no_grad()
def run_prefix(decoder: PackedDecoder, embeds: Tensor, lengths: Mirrored, header: Prefix | None = None) -> Prefix:
    """Run prefixes and return their keys and values.

    Args:
        decoder: runs them.
        embeds: (P, D) input embeddings.
        lengths: (S,) tokens of each.
        header: the tokens that all of them begin with, computed before as a prefix by itself.
    """
    start = 0 if header is None else int(header.lengths.numbers[0])
    rows = lengths.list_rows()
    positions = start + torch.arange(len(rows), device=rows.device) - lengths.list_starts()[rows]
    layout = _lay_out_prefixes(decoder, embeds, lengths, start)
    # No hidden state is needed, but quantized layers do not accept zero tokens.
    needed, past = rows.new_zeros(1), [] if header is None else header.layers
    _, recorded = decoder.run(embeds, positions, layout, past=past, needed=needed, record=True)
    return Prefix(
        [
            ((*past_keys, keys), (*past_values, values))
            for (past_keys, past_values), (keys, values) in zip(
                past or [((), ())] * len(recorded), recorded, strict=True
            )
        ],
        lengths,
        start,
    )


@torch.no_grad()
def extend_prefixes(
    decoder: PackedDecoder, embeds: Tensor, lengths: Mirrored, kept: Prefix
) -> list[tuple[Tensor, Tensor]]:
    """Run the tokens after the kept beginnings of prefixes, and return their keys and values.

    Args:
        decoder: runs them.
        embeds: (P, D) input embeddings of the tokens to run.
        lengths: (S,) tokens to run of each prefix.
        kept: beginnings of the S prefixes, which may be empty, after their header.

    Returns:
        By layer, (P, G, W) each.
    """
    rows, past = lengths.list_rows(), kept.list_past()
    own = torch.arange(len(rows), device=rows.device) - lengths.list_starts()[rows]
    positions = kept.header + past.lengths.tensor[rows] + own
    layout: RowLayout | SequenceLayout
    if decoder.uses_sequences(embeds):
        numbers = Mirrored.of(np.arange(len(lengths)), rows.device)
        segments = Segments(lengths, numbers, Mirrored.of(np.zeros_like(lengths.numbers), rows.device))
        layout = lay_out_sequences(segments, lengths, kept.header, past, _get_kernel(decoder))
    else:
        cost = _find_block_cost(decoder, embeds.device)
        layout = lay_out_tree(decoder.config, torch.full_like(rows, TAIL), positions, lengths, cost, embeds.dtype, kept)
    needed = rows.new_zeros(1)  # see ``run_prefix``
    return decoder.run(embeds, positions, layout, past=kept.layers, needed=needed, record=True)[1]


def run_tree(
    decoder: PackedDecoder,
    embeds: Tensor,
    targets: Tensor,
    positions: Tensor,
    lengths: Mirrored,
    prefix: Prefix | None = None,
    header: Tensor | None = None,
    needed: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Run tree rows, after a prefix or a header if there is one, and return their last hidden states.

    Args:
        decoder: runs them.
        embeds: (M, D) input embeddings.
        targets, positions: (M,) as in ``PromptBatch``.
        lengths: (C,) tokens of each row.
        prefix: result of ``run_prefix``, with the prefix of each row.
        header: (U, D) input embeddings of the tokens that all rows begin with, computed once.
        needed: (N,) index of the tokens whose hidden states are needed; None = all.
        segments: the rows' tails and branches; without them rows attend in blocks on every device.

    Returns:
        (M, D), correct where needed.
    """
    header_length = 0 if header is None else len(header)
    layout: RowLayout | SequenceLayout
    if segments is not None and decoder.uses_sequences(embeds):
        length, past = (header_length, None) if prefix is None else (prefix.header, prefix.list_past())
        layout = lay_out_sequences(segments, lengths, length, past, _get_kernel(decoder))
    else:
        cost = _find_block_cost(decoder, embeds.device)
        layout = lay_out_tree(decoder.config, targets, positions, lengths, cost, embeds.dtype, prefix, header_length)
    return decoder.run(
        embeds,
        positions,
        layout,
        header=header,
        header_mask=_build_header_mask(header_length, decoder.config, embeds),
        past=() if prefix is None else prefix.layers,
        needed=needed,
    )[0]


def _get_kernel(decoder: PackedDecoder) -> Any:
    return decoder.attention.kernel if isinstance(decoder.attention, Sequences) else flash_attention


def _find_block_cost(decoder: PackedDecoder, device: torch.device) -> int:
    """Return the cost of a block in query-key pairs."""
    blocks = decoder.attention if isinstance(decoder.attention, PaddedBlocks) else PaddedBlocks()
    return blocks.count_pairs(decoder.config, device)


def _lay_out_prefixes(
    decoder: PackedDecoder, embeds: Tensor, lengths: Mirrored, header: int
) -> RowLayout | SequenceLayout:
    """Return the layout of prefixes after a header computed before."""
    device, zeros = lengths.tensor.device, np.zeros_like(lengths.numbers)
    past = Past(header, Mirrored.of(zeros, device), torch.zeros_like(lengths.tensor)) if header else None
    if decoder.uses_sequences(embeds):
        rows = Mirrored.of(np.arange(len(lengths)), device)
        segments = Segments(lengths, rows, Mirrored.of(zeros, device))
        return lay_out_sequences(segments, lengths, header, past, _get_kernel(decoder))
    windowed = getattr(decoder.config, "sliding_window", None) is not None
    masks, spans = [], split_rows(lengths.numbers, zeros, header, _find_block_cost(decoder, device))
    for span in spans:
        if not windowed:
            # Causal attention needs no mask: tokens stand before the padding of their row.
            masks.append(Masks(None))
            continue
        keys = torch.arange(header + span.columns, device=device)[None]
        queries = keys[:, header:]
        allowed = queries[:, :, None] >= keys[:, None, :]
        masks.append(build_masks(allowed, queries, keys, decoder.config, embeds.dtype))
    return lay_out_rows(lengths, spans, masks, header, past)


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
    """Return the padded blocks of tree rows.

    Args:
        config: the decoder's configuration.
        targets, positions, lengths, prefix: see ``run_tree``.
        cost: of a block, see ``split_rows``.
        dtype: of the masks.
        header: U, tokens that all rows begin with, if there is no prefix.
    """
    num_shared, past_lengths, past = header, np.zeros_like(lengths.numbers), None
    if prefix is not None:
        num_shared, past_lengths, past = prefix.header, prefix.list_lengths(), prefix.list_past()
    starts, masks, spans = lengths.list_starts(), [], split_rows(lengths.numbers, past_lengths, num_shared, cost)
    for span in spans:
        columns = torch.arange(span.columns, device=targets.device)
        is_token = columns < lengths.tensor[span.rows, None]
        tokens = (starts[span.rows, None] + columns) * is_token
        row_targets, row_positions = torch.where(is_token, targets[tokens], PADDING), positions[tokens] * is_token
        earlier = torch.arange(num_shared + span.past, device=targets.device).expand(len(is_token), -1)
        visible = earlier >= 0 if past is None else earlier < num_shared + past.lengths.tensor[span.rows, None]
        allowed = torch.cat([visible[:, None].expand(-1, span.columns, -1), build_allowed(row_targets)], dim=2)
        key_positions = torch.cat([earlier, row_positions], dim=1)
        masks.append(build_masks(allowed, row_positions, key_positions, config, dtype))
    return lay_out_rows(lengths, spans, masks, num_shared, past)


def build_allowed(targets: Tensor) -> Tensor:
    """Return which token may attend to which: (R, T, T) bool, [row, query, key].

    A query attends to keys before it and to itself, if they belong to the tail or to the query's own target. Padding
    attends to itself, since a softmax over nothing is NaN.

    Args:
        targets: (R, T) the target of each token, ``TAIL`` in a tail and ``PADDING`` at padding.
    """
    query, key = targets[:, :, None], targets[:, None, :]
    columns = torch.arange(targets.shape[1], device=targets.device)
    return ((key == TAIL) | (key == query)) & (columns[:, None] >= columns[None, :])


def build_masks(
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, config: Any, dtype: torch.dtype
) -> Masks:
    """Return additive attention masks, (R, 1, T, K).

    Args:
        allowed: (R, T, K) bool.
        query_positions, key_positions: (R, T), (R, K) position ids; a sliding window is measured in them.
        config: the decoder's configuration.
        dtype: of the result.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return Masks(_to_additive(allowed, dtype))
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return Masks(_to_additive(allowed, dtype), _to_additive(allowed & near, dtype))


def _build_header_mask(length: int, config: Any, like: Tensor) -> Tensor | None:
    """Return the mask of attention within a header, if the header is longer than the sliding window."""
    window = getattr(config, "sliding_window", None)
    if window is None or length <= window:
        return None
    starts = torch.arange(length, device=like.device)
    distance = starts[:, None] - starts[None, :]
    return _to_additive(((distance >= 0) & (distance < window))[None], like.dtype)


def _to_additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, T, K) bool -> (R, 1, T, K), 0 or minus infinity."""
    # Rows start at multiples of 8 elements. GPU kernels need that; otherwise every layer would copy the mask.
    rows, queries, keys = allowed.shape
    padded = torch.zeros(rows, queries, -(-keys // 8) * 8, dtype=dtype, device=allowed.device)
    return padded[..., :keys].masked_fill_(~allowed, -torch.inf)[:, None]
