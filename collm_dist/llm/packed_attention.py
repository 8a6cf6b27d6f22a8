"""Decoders over packed tokens: everything but attention sees the real tokens alone, one after the other.

Rows of a batch have different lengths, and nine tenths of a decoder's work is done token by token. So a decoder is run
on one long row without padding; its attention, reached through transformers' attention interface, spreads queries, keys
and values over padded rows, compares them there, and packs what it finds again. Tokens that all rows begin with, the
header, are computed once, ahead of the others. Exact: no token's numbers change.

Shapes: C rows, T columns, M packed tokens, U of them in the header, P past tokens, K = P + U + T keys; H query heads,
G key/value heads, W width of a head, D of the decoder.
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
from collm_dist.llm.gated_network import slim_down

NAME = "collm_packed"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Masks:
    """What attention adds to its scores, in the layers' precision: 0 or minus infinity.

    Attributes:
        plain: (C, 1, T, K); None = each token sees the header and those before it in its row.
        window: the same for layers that look back no further than a window; None where there are none.
        header: (1, 1, U, U) for these layers; None where the window is wider.
    """

    plain: Tensor | None
    window: Tensor | None
    header: Tensor | None


@dataclass(frozen=True)
class Past:
    """Keys and values that a layer's rows see before their own.

    Attributes:
        keys, values: (S, G, P, W), zero at padding; S is C, or one for all rows.
        rows: (C,) which of the S each row sees; None = its own, or the one.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return (C, G, P, W) keys and values."""
        if self.rows is not None:
            return self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)
        return self.keys.expand(rows, -1, -1, -1), self.values.expand(rows, -1, -1, -1)


@dataclass
class LayerLayout:
    """How a layer's packed tokens stand in padded rows, and what they may see.

    Attributes:
        positions: (C, T) position ids.
        places: (M - U,) int64, where each packed token after the header stands in the rows laid end to end.
        header: U.
        masks: what is seen.
        past: what rows see before their own tokens, in its order. A past and a header exclude each other.
        record: whether keys and values are asked for.
        found: the rows' own, (C, G, T, W).
        plain: compute attention step by step instead of by PyTorch's fused kernels.
    """

    positions: Tensor
    places: Tensor
    header: int
    masks: Masks
    past: tuple[Past, ...] = ()
    record: bool = False
    found: tuple[Tensor, Tensor] | None = None
    plain: bool = False


@dataclass(frozen=True)
class _Options:
    """What a layer wants of its attention."""

    scaling: float | None
    dropout: float
    softcap: float | None


class _Spread(torch.autograd.Function):
    """Packed (M, ...) -> rows laid end to end (size, ...), zero at padding. No place occurs twice."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return packed.new_zeros(size, *packed.shape[1:]).index_copy_(0, places, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Pack(torch.autograd.Function):
    """Rows laid end to end (size, ...) -> packed (1, M, ...), not a view: a compiled layer would ask of what."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows[None].index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        packed = gradients[0][0]
        return packed.new_zeros(ctx.size, *packed.shape[1:]).index_copy_(0, places, packed), None


def pack(rows: Tensor, places: Tensor) -> Tensor:
    """(C, T, ...) -> (1, M, ...)."""
    return _Pack.apply(rows.flatten(0, 1), places)  # type: ignore[no-untyped-call, no-any-return]


def spread(packed: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """(1, M, ...) -> (C, T, ...), zero at padding."""
    spread_out: Tensor = _Spread.apply(packed[0], places, rows * columns)  # type: ignore[no-untyped-call]
    return spread_out.view(rows, columns, *packed.shape[2:])


def prepare_decoder(decoder: nn.Module) -> None:
    """Make a decoder able to run on packed tokens, once; what it does on plain padded rows stays the same.

    Args:
        decoder: the model below the language-modelling head.

    Raises:
        ConfigError: its layers mix tokens by other means than attention, or not through transformers' interface.
    """
    if "_runs_packed" in decoder.__dict__:
        return
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
    network = getattr(layers[-1], "mlp", None)
    if isinstance(network, nn.Module) and not hasattr(network, "experts") and not _is_adapted(network):
        network.forward = functools.partial(_run_on_needed, layers[-1], network.forward)
    decoder.__dict__["_runs_packed"] = is_plain


def restore_networks(decoder: nn.Module) -> None:
    """Give the layers' networks their own code again."""
    for network in _find_networks(decoder):
        network.__dict__.pop("forward", None)


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
    places: Tensor,
    masks: Masks,
    header: Tensor | None = None,
    past: Sequence[tuple[Past, ...]] = (),
    *,
    needed: Tensor | None = None,
    record: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run a decoder on the packed tokens of padded rows.

    Args:
        decoder: the model below the language-modelling head.
        embeds, positions: (C, T, D) input embeddings and (C, T) position ids.
        places: see ``LayerLayout``.
        masks: what tokens see.
        header: (U, D) input embeddings of what stands before every row, at the positions 0 to U - 1.
        past: by layer; none without any.
        needed: (N,) which of the M - U tokens' hidden states are asked for; None = all. The last layer's network is run
            on these alone.
        record: return each layer's keys and values of the rows.

    Returns:
        (1, M - U, D) last hidden states, right where they are needed, and if recorded the keys and values by layer,
        (C, G, T, W), zero at padding.
    """
    prepare_decoder(decoder)
    length = 0 if header is None else len(header)
    layouts = [
        LayerLayout(positions, places, length, masks, record=record, plain=decoder.__dict__["_runs_packed"])
        for _ in find_layers(decoder)
    ]
    for layout, of_layer in zip(layouts, past, strict=False):
        layout.past = of_layer
    packed, packed_positions = pack(embeds, places), positions.flatten()[places][None]
    if header is not None:
        packed = torch.cat([header[None], packed], dim=1)
        starts = torch.arange(length, device=positions.device)[None]
        packed_positions = torch.cat([starts, packed_positions], dim=1)
    # Not in the layout, on whose every difference compiled code is made anew. A layer that is recomputed belongs to the
    # latest pass, since its backward pass comes before the next one.
    find_layers(decoder)[-1].__dict__["_needed"] = None if needed is None else length + needed
    output = decoder(
        inputs_embeds=packed,
        # Nothing but its four dimensions counts: transformers takes it for a finished mask and makes none of its own.
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        position_ids=packed_positions,
        use_cache=False,
        layout=layouts,
    )
    found = [layout.found for layout in layouts if layout.found is not None]
    return output.last_hidden_state[:, length:], found


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
    return spread(forward(pack(hidden, needed)), needed, 1, hidden.shape[1])


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
    in_window = sliding_window is not None and layout.masks.window is not None
    mask = layout.masks.window if in_window else layout.masks.plain
    compute = _compare if layout.plain or softcap is not None else _compare_fused
    length, (rows, columns) = layout.header, layout.positions.shape
    header: list[Tensor] = []
    keys, values = [], []
    if length:
        # Copies: kept for the backward pass, a part would keep the whole.
        first_query, first_key, first_value = (one[:, :, :length].contiguous() for one in (query, key, value))
        first_mask = layout.masks.header if in_window else None
        header.append(compute(first_query, first_key, first_value, first_mask, options).transpose(1, 2))
        keys, values = [first_key.expand(rows, -1, -1, -1)], [first_value.expand(rows, -1, -1, -1)]
        query, key, value = (one[:, :, length:] for one in (query, key, value))
    for past in layout.past:
        of_rows = past.take(rows)
        keys.append(of_rows[0])
        values.append(of_rows[1])
    query, key, value = (
        spread(one.transpose(1, 2), layout.places, rows, columns).transpose(1, 2) for one in (query, key, value)
    )
    if layout.record:
        layout.found = key, value
    if keys:
        key, value = torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)
    if mask is None and keys:
        # A causal kernel wants as many queries as keys.
        query = pad(query, (0, 0, key.shape[2] - columns, 0))
    attended = compute(query, key, value, mask, options)[:, :, -columns:]
    return torch.cat([*header, pack(attended.transpose(1, 2), layout.places)], dim=1), None


def _compare_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """By the fastest kernel that PyTorch has; without a mask each query sees the keys up to its own place."""
    groups = query.shape[1] // key.shape[1]
    # Fused kernels take fewer key heads than query heads, but with a mask those for GPUs do not.
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


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
