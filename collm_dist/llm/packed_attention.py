"""Decoders over packed tokens: everything but attention sees the real tokens alone, one after the other.

Rows of a batch have different lengths, and nine tenths of a decoder's work is done token by token. So a decoder is run
on one long row without padding; its attention, reached through transformers' attention interface, lays out rows of
similar length in blocks, compares them there, and packs what it finds again. Tokens that all rows begin with, the
header, are computed once, ahead of the others. Exact: no token's numbers change.

Shapes: M packed tokens, U of them in the header; a block has R rows, T columns, m tokens, P past tokens, K = P + U + T
keys; H query heads, G key/value heads, W width of a head, D of the decoder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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
from collm_dist.llm.fused_norm import fuse_norm, is_fused
from collm_dist.llm.gated_network import slim_down
from collm_dist.llm.packing import lay_out, pack, spread
from collm_dist.llm.row_blocks import Block

NAME = "collm_packed"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass
class LayerLayout:
    """How a layer's packed tokens stand in rows, and what they may see.

    Attributes:
        blocks: of neighbouring rows, in the order of their tokens.
        sizes: tokens of the header, if there is one, and of each block; None where one block is all there is.
        header: U.
        header_mask: (1, 1, U, U) for layers that look back no further than a window; None where it is wider.
        past: keys and values, (1, G, tokens, W) each, that blocks choose from. A past and a header exclude each other.
        record: whether keys and values are asked for.
        found: the past's and the rows' own after it.
        plain: compute attention step by step instead of by PyTorch's fused kernels.
    """

    blocks: list[Block]
    sizes: list[int] | None
    header: int
    header_mask: Tensor | None
    past: tuple[Tensor, Tensor] | None = None
    record: bool = False
    found: tuple[Tensor, Tensor] | None = None
    plain: bool = False


@dataclass(frozen=True)
class _Options:
    """What a layer wants of its attention."""

    scaling: float | None
    dropout: float
    softcap: float | None


def prepare_decoder(decoder: nn.Module) -> None:
    """Make a decoder able to run on packed tokens, once; what it does on plain padded rows stays the same.

    Args:
        decoder: the model below the language-modelling head.

    Raises:
        ConfigError: its layers mix tokens by other means than attention, or not through transformers' interface.
    """
    if "_runs_packed" in decoder.__dict__:
        return
    # cuDNN, which PyTorch prefers on newer GPUs, plans anew for each shape, for longer than a step takes; and nearly
    # every micro-batch has a shape of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config: Any = decoder.config
    others = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if others or not getattr(decoder, "_supports_attention_backend", False):
        why = f"has layers of type {', '.join(sorted(others))}" if others else "computes attention in a way of its own"
        raise ConfigError(
            f"llm.backbone: a {config.model_type} model {why}, so contexts cannot be shared; choose one whose layers "
            "are plain attention reached through transformers' attention interface (Llama, Qwen, Mistral, Gemma, "
            "GPT-NeoX and most others)"
        )
    is_plain = config._attn_implementation == "eager"
    config._attn_implementation = NAME
    layers: Any = find_layers(decoder)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(_hand_out, index), with_kwargs=True)
    for one in _find_networks(decoder):
        slim_down(one)
    for one in decoder.modules():
        fuse_norm(one)
    network = getattr(layers[-1], "mlp", None)
    if isinstance(network, nn.Module) and not hasattr(network, "experts") and not _is_adapted(network):
        network.forward = functools.partial(_run_on_needed, layers[-1], network.forward)
    decoder.__dict__["_runs_packed"] = is_plain


def restore_modules(decoder: nn.Module) -> None:
    """Give networks and norms their own code again."""
    norms = [one for one in decoder.modules() if is_fused(one)]
    for module in [*_find_networks(decoder), *norms]:
        module.__dict__.pop("forward", None)


def _find_networks(decoder: nn.Module) -> Iterator[nn.Module]:
    """Yield the feed-forward networks of the layers that have one by its usual name."""
    for layer in find_layers(decoder):
        if isinstance(network := getattr(layer, "mlp", None), nn.Module):
            yield network


def _is_adapted(network: nn.Module) -> bool:
    """Return whether a network has adapters: their dropout is drawn for every token, needed or not."""
    return any("lora_" in name for name, _ in network.named_parameters())


def find_layers(decoder: nn.Module) -> Sequence[nn.Module]:
    """Return a decoder's layers, whatever it calls them."""
    config: Any = decoder.config
    lists = (list(one) for one in decoder.modules() if isinstance(one, nn.ModuleList))
    return next(one for one in lists if len(one) == config.num_hidden_layers)


def run_packed(
    decoder: nn.Module,
    embeds: Tensor,
    positions: Tensor,
    blocks: list[Block],
    sizes: list[int],
    *,
    header: Tensor | None = None,
    header_mask: Tensor | None = None,
    past: Sequence[tuple[Tensor, Tensor]] = (),
    needed: Tensor | None = None,
    record: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run a decoder on packed tokens.

    Args:
        decoder: the model below the language-modelling head.
        embeds, positions: (M - U, D) input embeddings and (M - U,) position ids.
        blocks, sizes: the rows, and how many of the tokens are in each block.
        header: (U, D) input embeddings of what stands before every row, at the positions 0 to U - 1.
        header_mask, past: see ``LayerLayout``; the past by layer, none without any.
        needed: (N,) which of the tokens' hidden states are asked for; None = all. The last layer's network is run on
            these alone.
        record: return each layer's keys and values: the past's and, after them, the tokens' own.

    Returns:
        (M - U, D) last hidden states, right where they are needed, and if recorded the keys and values by layer.
    """
    prepare_decoder(decoder)
    length = 0 if header is None else len(header)
    divided = [length, *sizes] if length else sizes
    is_plain = decoder.__dict__["_runs_packed"]
    of_layers: Sequence[tuple[Tensor, Tensor] | None] = past or [None] * len(find_layers(decoder))
    layouts = [
        LayerLayout(blocks, divided if len(divided) > 1 else None, length, header_mask, one, record, plain=is_plain)
        for one in of_layers
    ]
    # A copy even without a header: of a view of another tensor compiled code would ask of what.
    whole = torch.cat([(embeds[:0] if header is None else header)[None], embeds[None]], dim=1)
    positions = torch.cat([torch.arange(length, device=positions.device), positions])
    # Not in the layout, on whose every difference compiled code is made anew. A layer that is recomputed belongs to the
    # latest pass, since its backward pass comes before the next one.
    find_layers(decoder)[-1].__dict__["_needed"] = None if needed is None else length + needed
    output = decoder(
        inputs_embeds=whole,
        # Nothing but its four dimensions counts: transformers takes it for a finished mask and makes none of its own.
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        position_ids=positions[None],
        use_cache=False,
        layout=layouts,
    )
    found = [layout.found for layout in layouts if layout.found is not None]
    return output.last_hidden_state[0, length:], found


def _hand_out(index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a layer its own part, so that compiled code is the same for all layers."""
    layouts: list[LayerLayout] | None = kwargs.get("layout")
    if layouts is not None:
        return args, {**kwargs, "layout": layouts[index]}
    layer.__dict__["_needed"] = None  # a pass that is not ours
    return args, kwargs


def _run_on_needed(layer: Any, forward: Any, hidden: Tensor) -> Tensor:
    """Run a layer's network on the tokens that are needed, and leave zeros for the others."""
    needed = layer.__dict__.get("_needed")
    if needed is None:
        return forward(hidden)  # type: ignore[no-any-return]
    return spread(forward(pack(hidden, needed)), needed, hidden.shape[1])


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface wants it: (1, H, M, W), (1, G, M, W) twice -> (1, M, H, W)."""
    options = _Options(scaling, dropout, softcap)
    if layout is None:
        return _attend_plainly(module, query, key, value, attention_mask, options, others)
    if others.get("s_aux") is not None:
        raise ConfigError("llm.backbone: attention sinks are not supported; choose another backbone")
    in_window = sliding_window is not None
    compute: Any = _compare if layout.plain or softcap is not None else _compare_fused
    compute = functools.partial(compute, options=options)
    ahead: Sequence[Tensor] | None = layout.past
    attended: list[Tensor] = []
    pieces: list[tuple[Tensor, ...]] = [(query, key, value)]
    if layout.sizes is not None:
        pieces = list(zip(*(torch.split(one, layout.sizes, dim=2) for one in pieces[0]), strict=True))
    if layout.record:
        before = ahead or (key[:, :, :0], value[:, :, :0])
        layout.found = _join(before[0], key), _join(before[1], value)
    if layout.header:
        # Copies: kept for the backward pass, a part would keep the whole.
        first_query, *ahead = (one.contiguous() for one in pieces.pop(0))
        mask = layout.header_mask if in_window else None
        attended.append(compute(first_query, ahead[0], ahead[1], mask).transpose(1, 2))
    for block, piece in zip(layout.blocks, pieces, strict=True):
        mask = block.masks.window if in_window and block.masks.window is not None else block.masks.plain
        attended.append(_attend_in_block(block, piece, ahead, mask, compute))
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1), None


def _attend_in_block(
    block: Block, piece: tuple[Tensor, ...], ahead: Sequence[Tensor] | None, mask: Tensor | None, compute: Any
) -> Tensor:
    """(1, H, m, W), (1, G, m, W) twice -> (1, m, H, W); ``ahead``: keys and values that rows choose from, or share."""
    rows, columns = block.is_token.shape
    query, key, value = (lay_out(one.transpose(1, 2), block).transpose(1, 2) for one in piece)
    if ahead is not None:
        key, value = _join(_take(ahead[0], block.past, rows), key), _join(_take(ahead[1], block.past, rows), value)
        if mask is None:
            # A causal kernel wants as many queries as keys.
            query = pad(query, (0, 0, key.shape[2] - columns, 0))
    attended = compute(query, key, value, mask)[:, :, query.shape[2] - columns :]
    return pack(attended.transpose(1, 2), block.places)


def _take(tokens: Tensor, chosen: Tensor | None, rows: int) -> Tensor:
    """(1, G, tokens, W) -> (R, G, P, W); None = all of them for every row."""
    if chosen is None:
        return tokens.expand(rows, -1, -1, -1)
    return tokens[0].index_select(1, chosen.flatten()).view(-1, *chosen.shape, tokens.shape[3]).transpose(0, 1)


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=2)


def _compare_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """By the fastest kernel that PyTorch has; without a mask each query sees the keys up to its own place.

    Fused kernels take fewer key heads than query heads, but with a mask those for GPUs do not. Where the mask is
    repeated (see ``Masks``), the heads that share a key head are taken as one, with all their queries end to end.
    """
    groups = query.shape[1] // key.shape[1]
    if mask is not None and mask.shape[2] != query.shape[2]:
        rows, heads, columns, width = query.shape
        together = query.reshape(rows, heads // groups, groups * columns, width)
        found = scaled_dot_product_attention(
            together, key, value, attn_mask=mask, dropout_p=options.dropout, scale=options.scaling
        )
        return found.reshape(rows, heads, columns, width)
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


def _compare(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Step by step, with the soft cap that some models put on scores (Gemma 2)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = query @ key.transpose(2, 3) * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    shares = (scores + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return drop(shares, options.dropout) @ value


def _attend_plainly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: _Options,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    """A pass that is not ours, over plain padded rows."""
    if mask is not None and mask.shape[-1] < key.shape[2]:
        raise ConfigError(
            f"llm.backbone: {type(module).__name__} does not hand its arguments down to its attention, so contexts "
            "cannot be shared; choose another backbone"
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
        **others,
    )


# Compiled code would be made anew for each number of blocks; so a compiled layer ends before attention and begins again
# behind it.
AttentionInterface.register(NAME, torch.compiler.disable(_attend))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
