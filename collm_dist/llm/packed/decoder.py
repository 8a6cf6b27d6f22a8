"""``PackedDecoder``: a transformers decoder changed to run on packed tokens, and the only code that changes one.

Rows of a batch have different lengths, and nine tenths of a decoder's work is done token by token. So a decoder runs on
one long row without padding; only its attention lays out rows (``attention``). Tokens that all rows begin with, the
header, are computed once, before the others. This is exact: no token's hidden state changes.

Shapes: M packed tokens, U of them in the header; N needed tokens; G key/value heads, W width of a head, D of the
decoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collm_dist.errors import ConfigError
from collm_dist.llm.packed.attention import ATTENTION, KeyValues, LayerLayout
from collm_dist.llm.packed.lean_modules import GATED_MLPS, RMS_NORMS, run_gated_mlp, run_rms_norm
from collm_dist.llm.packed.packing import gather, scatter
from collm_dist.llm.packed.row_blocks import PaddedBlocks, RowLayout
from collm_dist.llm.packed.sequences import SequenceLayout, Sequences, supports_sequences

# Families whose attention interface looks like any other's, but is used in another way.
_OTHER_WAYS = {
    "blt": "reads patches of bytes",
    "dory": "runs its layers in loops",
    "nemotron": "does not pass its arguments to its attention",
}
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Graphs of one function: with and without gradients, of a first layer, of a single token, which torch always treats
# apart. Passes beyond the limit run uncompiled.
_MAX_GRAPHS = 24


class PackedDecoder:
    """A decoder that runs on packed tokens. On plain padded rows it computes the same as before.

    The constructor changes the decoder in place, in this order:

    1. The attention implementation becomes ``attention.ATTENTION``.
    2. Each layer takes its own ``LayerLayout`` from the list that the decoder passes to all of them.
    3. Gated MLPs and RMS norms run by the functions of ``lean_modules``.
    4. The last layer's MLP runs on the needed tokens only, unless it has adapters, whose dropout is drawn for every
       token, or is a mixture of experts.
    5. Activation checkpointing: layers are recomputed in the backward pass. transformers' own would drop the layouts.
    6. Compilation, which leaves out 3 and 4: the compiler decides itself what to recompute, and an MLP of fewer tokens
       would need graphs of its own.

    A decoder is changed by one PackedDecoder at a time: another undoes the changes of the one before. That one still
    runs on the decoder, with the later one's changes.

    Attributes:
        module: the decoder.
        config: its configuration.
        layers: its layers.
        eager: attention runs step by step, in blocks (``llm.attention=eager``).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        attention: PaddedBlocks | Sequences | None = None,
        checkpointing: bool = False,
        compile_backend: str | None = None,
        norm: Callable[[Any, Tensor], Tensor] = run_rms_norm,
    ) -> None:
        """Change a decoder.

        Args:
            module: the model below the language-modelling head, with its adapters, if it has any.
            attention: how packed tokens attend; None = sequences where the device supports them, blocks elsewhere.
            checkpointing: recompute layers in the backward pass.
            compile_backend: of ``torch.compile`` for the layers, which are then all of one class and have whole weights
                (ZeRO-3 gathers partitioned ones by hooks that end a graph). The first pass of each kind takes seconds
                to minutes. Random numbers are those of uncompiled layers.
            norm: runs an RMS norm.

        Raises:
            ConfigError: layers mix tokens by other means than attention, or not through transformers' interface.
        """
        check_support(module)
        config: Any = module.config
        self.module, self.config = module, config
        self.attention, self.checkpointing = attention, checkpointing
        layers = find_layers(module)
        assert layers is not None  # checked
        self.layers = layers
        self._replaced: list[tuple[nn.Module, Any]] = []
        earlier = getattr(self.layers[0].forward, "owner", None)
        if isinstance(earlier, PackedDecoder):
            earlier.restore()
        # cuDNN, PyTorch's preference on newer GPUs, plans each new shape for longer than a step takes, and nearly every
        # micro-batch has a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._plain_attention: str = config._attn_implementation
        self.eager = self._plain_attention == "eager"
        config._attn_implementation = ATTENTION
        last_mlp = None
        if compile_backend is None:
            self._replace_modules(norm)
            last_mlp = self._replace_last_mlp()
        compiled = None if compile_backend is None else _compile(type(self.layers[0]), compile_backend)
        for index, layer in enumerate(self.layers):
            forward: Any = layer.forward if compiled is None else functools.partial(compiled, layer)
            is_last = index == len(self.layers) - 1
            self._replace(layer, _PackedLayer(self, index, forward, last_mlp if is_last else None))

    def uses_sequences(self, embeds: Tensor) -> bool:
        """Return whether tokens with these (M, D) embeddings attend in sequences, not in blocks."""
        if self.eager:
            return False
        if self.attention is None:
            return supports_sequences(self.config, embeds)
        return isinstance(self.attention, Sequences)

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        tokens: RowLayout | SequenceLayout,
        *,
        header: Tensor | None = None,
        header_mask: Tensor | None = None,
        past: Sequence[KeyValues] = (),
        needed: Tensor | None = None,
        record: bool = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the decoder on packed tokens.

        Args:
            embeds, positions: (M - U, D) input embeddings and (M - U,) position ids.
            tokens: layout of the tokens.
            header: (U, D) input embeddings of the tokens before every row, at the positions 0 to U - 1.
            header_mask, past: see ``LayerLayout``; the past by layer, empty if there is none.
            needed: (N,) index of the tokens whose hidden states are needed; None = all.
            record: return each layer's keys and values of the tokens.

        Returns:
            (M - U, D) last hidden states, correct where they are needed, and if recorded the keys and values by layer,
            (M, G, W) each.
        """
        length = 0 if header is None else len(header)
        pasts: Sequence[KeyValues | None] = past or [None] * len(self.layers)
        layouts = [
            LayerLayout(
                tokens,
                length,
                header_mask,
                layer_past,
                None if needed is None else length + needed,
                record,
                eager=self.eager,
            )
            for layer_past in pasts
        ]
        # A copy even without a header: compiled code would add guards for a view of another tensor.
        packed = torch.cat([(embeds[:0] if header is None else header)[None], embeds[None]], dim=1)
        positions = torch.cat([torch.arange(length, device=positions.device), positions])
        output = self.module(
            inputs_embeds=packed,
            # Only its four dimensions count: transformers takes it for a finished mask and builds none.
            attention_mask=embeds.new_zeros(1, 1, 1, 1),
            position_ids=positions[None],
            use_cache=False,
            layout=layouts,
        )
        recorded = [layout.recorded for layout in layouts if layout.recorded is not None]
        return output.last_hidden_state[0, length:], recorded

    def restore(self) -> None:
        """Undo all changes of the decoder."""
        for module, forward in reversed(self._replaced):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._replaced.clear()
        self.config._attn_implementation = self._plain_attention

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace a module's forward function, and remember the one that it had of its own, if any."""
        self._replaced.append((module, vars(module).get("forward")))
        module.forward = forward

    def _replace_modules(self, norm: Callable[[Any, Tensor], Tensor]) -> None:
        """Let known modules run leaner, unless someone else has replaced their forward function."""
        for layer in self.layers:
            mlp: Any = getattr(layer, "mlp", None)
            if type(mlp) in GATED_MLPS and "forward" not in vars(mlp):
                self._replace(mlp, functools.partial(run_gated_mlp, mlp))
        for module in self.module.modules():
            if type(module) in RMS_NORMS and "forward" not in vars(module):
                self._replace(module, functools.partial(norm, module))

    def _replace_last_mlp(self) -> _LastMlp | None:
        """Let the last layer's MLP run on the needed tokens only, if it can."""
        mlp = getattr(self.layers[-1], "mlp", None)
        if not isinstance(mlp, nn.Module) or hasattr(mlp, "experts"):
            return None
        if any("lora_" in name for name, _ in mlp.named_parameters()):
            return None
        last_mlp = _LastMlp(mlp.forward)
        self._replace(mlp, last_mlp)
        return last_mlp


class _LastMlp:
    """Forward function of the last layer's MLP.

    Attributes:
        needed: (N,) index of the tokens to run it on, of the layer's present pass; None = all.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self.needed: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(1, M, D) -> (1, M, D), zero where it is not needed."""
        if self.needed is None:
            return self._forward(hidden)
        tokens = self._forward(gather(hidden.squeeze(0), self.needed)[None]).squeeze(0)
        return scatter(tokens, self.needed, hidden.shape[1])[None]


class _PackedLayer:
    """Forward function of a layer: takes the layer's layout, and recomputes the layer if asked to."""

    def __init__(
        self, owner: PackedDecoder, index: int, forward: Callable[..., Any], last_mlp: _LastMlp | None
    ) -> None:
        self.owner = owner
        self._index, self._forward, self._last_mlp = index, forward, last_mlp

    def __call__(self, *args: Any, layout: Sequence[LayerLayout] | None = None, **kwargs: Any) -> Any:
        if layout is not None:
            kwargs["layout"] = layout[self._index]
            kwargs["layout"].recomputed = self.owner.checkpointing
        if self.owner.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._last_mlp is not None:  # in the layer, so that a recomputed one sets it again
            self._last_mlp.needed = kwargs["layout"].needed if "layout" in kwargs else None
        return self._forward(*args, **kwargs)


def find_decoder(backbone: Any) -> nn.Module:
    """Return the model below a causal language model's head."""
    decoder: nn.Module = backbone.base_model if backbone.base_model is not backbone else backbone.get_decoder()
    return decoder


def find_layers(decoder: nn.Module) -> list[nn.Module] | None:
    """Return a decoder's layers, by any name; None if there is no list of them."""
    config: Any = decoder.config
    lists = (list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == config.num_hidden_layers), None)


def check_support(decoder: nn.Module) -> None:
    """Check that contexts can be shared on a decoder, which may be on the meta device.

    Raises:
        ConfigError: its layers mix tokens by other means than attention, or not through transformers' interface.
    """
    config: Any = decoder.config
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if config.model_type in _OTHER_WAYS:
        cause = _OTHER_WAYS[config.model_type]
    elif unknown:
        cause = f"has layers of type {', '.join(sorted(unknown))}"
    elif not getattr(decoder, "_supports_attention_backend", False):
        cause = "has its own attention code"
    elif any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in decoder.named_parameters()):
        cause = "has attention sinks"
    elif any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        cause = "lets tokens attend to later ones"
    elif find_layers(decoder) is None:
        cause = "has no list of layers"
    else:
        return
    raise ConfigError(
        f"llm.backbone: a {config.model_type} model {cause}, so contexts cannot be shared; choose a backbone whose "
        "layers are plain attention through transformers' attention interface (Llama, Qwen, Mistral, Gemma, GPT-NeoX "
        "and most others)"
    )


def _compile(layer_class: type[nn.Module], backend: str) -> Callable[..., Any]:
    """Return the compiled forward function of a layer class.

    All layers run the same function, so the same graphs serve them all, and compiling 80 layers takes as long as two.
    Attention is not compiled: it has any number of blocks and consists of PyTorch's kernels anyway. So a layer has
    three graphs: before attention, after it, and the MLP.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    compiled: Callable[..., Any] = torch.compile(layer_class.forward, dynamic=True, backend=backend, options=options)
    return compiled
