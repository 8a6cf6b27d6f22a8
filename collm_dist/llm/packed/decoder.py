"""Decoders over packed tokens: everything but attention sees the real tokens alone, one after the other.

Rows of a batch have different lengths, and nine tenths of a decoder's work is done token by token. So a decoder is run
on one long row without padding; its attention, reached through transformers' attention interface, lays out rows of
similar length in blocks, compares them there, and packs what it finds again. Tokens that all rows begin with, the
header, are computed once, ahead of the others. Exact: no token's numbers change.

Shapes: M packed tokens, U of them in the header; A tokens of a past; a block has R rows, T columns and K keys; H query
heads, G key/value heads, W width of a head, D of the decoder.
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
from collm_dist.llm.packed.fused_norm import fuse_norm, is_fused
from collm_dist.llm.packed.gated_mlp import slim_down
from collm_dist.llm.packed.key_recompute import Recomputed, recompute_in_backward
from collm_dist.llm.packed.packing import collect, lay_out, spread
from collm_dist.llm.packed.row_layout import RowLayout
from collm_dist.llm.packed.sequences import WIDEST_HEAD, SequenceLayout, compare_sequences

NAME = "collm_packed"
# Set on a decoder whose layers are recomputed in the backward pass.
CHECKPOINTED = "_is_checkpointed"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


# A layer's keys and its values, each in parts that stand one after the other, (a, G, W).
Parts = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass
class LayerLayout:
    """How a layer's packed tokens stand in rows, and what they may see.

    Attributes:
        rows: in which blocks, or as which sequences.
        header: U.
        header_mask: (1, 1, U, U) for layers that look back no further than a window; None where it is wider.
        past: what rows see that was computed before. A past and a header exclude each other.
        record: whether keys and values are asked for.
        found: the rows' own, (M, G, W) each.
        plain: compute attention step by step instead of by PyTorch's fused kernels.
        checkpointed: the whole layer is recomputed in the backward pass.
    """

    rows: RowLayout | SequenceLayout
    header: int
    header_mask: Tensor | None
    past: Parts | None = None
    record: bool = False
    found: tuple[Tensor, Tensor] | None = None
    plain: bool = False
    checkpointed: bool = False


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
    for module in [*_find_networks(decoder), *(one for one in decoder.modules() if is_fused(one))]:
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
    rows: RowLayout | SequenceLayout,
    *,
    header: Tensor | None = None,
    header_mask: Tensor | None = None,
    past: Sequence[Parts] = (),
    needed: Tensor | None = None,
    record: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run a decoder on packed tokens.

    Args:
        decoder: the model below the language-modelling head.
        embeds, positions: (M - U, D) input embeddings and (M - U,) position ids.
        rows: where the tokens stand.
        header: (U, D) input embeddings of what stands before every row, at the positions 0 to U - 1.
        header_mask, past: see ``LayerLayout``; the past by layer, none without any.
        needed: (N,) which of the tokens' hidden states are asked for; None = all. The last layer's network is run on
            these alone.
        record: return each layer's keys and values of the tokens.

    Returns:
        (M - U, D) last hidden states, right where they are needed, and if recorded the keys and values by layer,
        (M, G, W) each.
    """
    prepare_decoder(decoder)
    length = 0 if header is None else len(header)
    is_plain = decoder.__dict__["_runs_packed"]
    of_layers: Sequence[Parts | None] = past or [None] * len(find_layers(decoder))
    flags = {"plain": is_plain, "checkpointed": CHECKPOINTED in decoder.__dict__}
    layouts = [LayerLayout(rows, length, header_mask, one, record, **flags) for one in of_layers]
    # A copy even without a header: of a view of another tensor compiled code would ask of what.
    whole = torch.cat([(embeds[:0] if header is None else header)[None], embeds[None]], dim=1)
    positions = torch.cat([torch.arange(length, device=positions.device), positions])
    # Not in the layout, which a layer's network is not handed. A layer that is recomputed belongs to the latest pass,
    # since its backward pass comes before the next one.
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
    """Give a layer its own part of the layout."""
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
    return spread(forward(collect(hidden.squeeze(0), needed)[None]).squeeze(0), needed, hidden.shape[1])[None]


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
    # Token by token, as projections leave them: (M, heads, W) each.
    queries, keys, values = (one.transpose(1, 2).squeeze(0) for one in (query, key, value))
    if layout.record:
        layout.found = keys, values
    if isinstance(layout.rows, SequenceLayout):
        if softcap is not None or key.shape[-1] != value.shape[-1] or key.shape[-1] > WIDEST_HEAD:
            raise ConfigError(
                f"llm.backbone: {type(module).__name__} attends in a way that the fastest kernel does not know; set "
                "llm.attention=eager"
            )
        own = [_divide(one, layout.header) for one in (keys, values)]
        laid, recomputed = _lay_out_keys(layout, (keys, values), own)
        with recompute_in_backward(*recomputed):
            found = compare_sequences(
                layout.rows, queries, *laid, scaling=scaling, dropout=dropout, window=sliding_window
            )
        return found[None], None
    compute: Any = _compare if layout.plain or softcap is not None else _compare_fused
    compute = functools.partial(compute, options=options)
    rows, in_window = layout.rows, sliding_window is not None
    attended: list[Tensor] = []
    (first, queries), *own = (_divide(one, layout.header) for one in (queries, keys, values))
    if first is not None and own[0][0] is not None and own[1][0] is not None:
        # Copies: kept for the backward pass, a part would keep the whole.
        alone = (one.transpose(0, 1)[None].contiguous() for one in (first, own[0][0], own[1][0]))
        mask = layout.header_mask if in_window else None
        attended.append(compute(*alone, mask).transpose(1, 2).flatten(0, 1))
    laid, recomputed = _lay_out_keys(layout, (keys, values), own)
    queries = lay_out(queries, rows.queries, rows.query_places)
    with recompute_in_backward(*recomputed):
        attended += _attend_in_blocks(rows, queries, laid[0], laid[1], compute, in_window=in_window)
    found = collect(attended[0] if len(attended) == 1 else torch.cat(attended), rows.found)
    return found[None], None


def _divide(packed: Tensor, header: int) -> tuple[Tensor | None, Tensor]:
    """Return what is packed of the header, if it is, and the rest."""
    return tuple(torch.split(packed, [header, len(packed) - header])) if header else (None, packed)  # type: ignore[return-value]


def _lay_out_keys(
    layout: LayerLayout, packed: Sequence[Tensor], divided: Sequence[tuple[Tensor | None, Tensor]]
) -> tuple[list[Tensor], list[Recomputed]]:
    """Return keys and values at their places, and those that are not to be kept for the backward pass.

    Args:
        layout: of the layer.
        packed: keys and values.
        divided: the same, the header's apart.
    """
    rows, laid, again = layout.rows, [], []
    for place, (whole, (ahead, own)) in enumerate(zip(packed, divided, strict=True)):
        parts = (*(layout.past[place] if layout.past is not None else ()), whole.detach())
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        found = lay_out(own, rows.keys, rows.key_places, whole=joined, ahead=ahead, shared=rows.header_places)
        laid.append(found)
        again.append(Recomputed(found, parts, rows.keys))
    # In blocks a header alone is copied for a few rows; sequences have many copies of all that is shared.
    copied = layout.past is not None or isinstance(rows, SequenceLayout)
    return laid, again if copied and not layout.checkpointed else []


def _attend_in_blocks(
    rows: RowLayout,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    compute: Any,
    *,
    in_window: bool,
) -> Iterator[Tensor]:
    """Yield what each block's queries find.

    Args:
        rows: the blocks.
        queries, keys, values: at their places.
        compute: compares a block.
        in_window: whether the layer looks back no further than a window.
    """
    of_queries = torch.split(queries, [block.rows * block.columns for block in rows.blocks])
    of_keys, of_values = (
        torch.split(one, [block.rows * block.keys for block in rows.blocks]) for one in (keys, values)
    )
    for block, query, key, value in zip(rows.blocks, of_queries, of_keys, of_values, strict=True):
        query, key, value = (one.view(block.rows, -1, *one.shape[1:]).transpose(1, 2) for one in (query, key, value))
        mask = block.masks.window if in_window and block.masks.window is not None else block.masks.plain
        ahead = 0
        if mask is None:
            # A causal kernel wants as many queries as keys.
            ahead = block.keys - block.columns
            query = pad(query, (0, 0, ahead, 0))
        found = compute(query, key, value, mask)[:, :, ahead:]
        yield found.transpose(1, 2).flatten(0, 1)


def _compare_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """By the fastest kernel that PyTorch has; without a mask each query sees the keys up to its own place.

    Fused kernels take fewer key heads than query heads, but with a mask those for GPUs do not.
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
