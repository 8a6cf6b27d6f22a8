"""Memory plan of a tuning stage, without a GPU (``--dry-run``).

Activation memory is measured, not estimated: one and two layers of the backbone, of full width and with random weights,
run a forward pass on the CPU, and the tensors that autograd saves are counted. The training code itself runs, so
adapters, masks and precision count for any architecture.

Shapes: T tokens of a micro-batch, L layers, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from collm_dist.llm.backbone import Quantization
from collm_dist.llm.lora import Rank, TargetModules, make_trainable
from collm_dist.llm.lora_dropout import install_keyed_dropout
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.lean_modules import run_rms_norm
from collm_dist.llm.packed.passes import run_tree
from collm_dist.prompt_batch import TAIL, Mirrored
from collm_dist.tuning.flops import DecoderShape
from collm_dist.tuning.token_budget import BYTES_PER_TRAINABLE, USABLE_SHARE

# Enough tokens that the constant part hardly counts.
TRIAL_TOKENS = 256
_TINY_VOCABULARY = 64
# Bytes of a quantized weight with its scales: 4 bits, an 8-bit scale per 64 weights and a 32-bit scale per 256 scales;
# 8 bits and a negligible 32-bit scale per row.
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class LoraSettings:
    """What stage 1 trains; see the config section ``lora``."""

    rank: Rank
    alpha: int
    dropout: float
    target_modules: TargetModules


@dataclass(frozen=True)
class LayerMemory:
    """Memory that autograd saves, in bytes per token.

    Attributes:
        per_layer: of each layer.
        outside: before and after the layers.
        inputs: of a layer's input, which is all that a checkpointed layer saves.
        trainable: trainable parameters of each layer.
    """

    per_layer: float
    outside: float
    inputs: float
    trainable: int


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one process in bytes.

    Attributes:
        weights: backbone.
        state: gradients, moments and float32 copies of the trainable parameters.
        activations: saved for the backward pass, with the prefixes' keys and values.
        working: extra memory at the peak: gradients of one layer's activations, or one recomputed layer.
    """

    weights: int
    state: int
    activations: int
    working: int

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.state + self.activations + self.working


def count_weight_bytes(backbone: Any, dtype: torch.dtype, quantization: Quantization) -> int:
    """Return the bytes of a backbone's weights; it may be on the meta device."""
    total: int = sum(param.numel() for param in backbone.parameters()) * dtype.itemsize
    if quantization == "none":
        return total
    layers = backbone.get_decoder().layers
    linear: int = sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))
    return total - round(linear * (dtype.itemsize - QUANTIZED_BYTES[quantization]))


class _NormOnGpu(torch.autograd.Function):
    """RMSNorm that saves the same as PyTorch's GPU kernel: its input, and one number per token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return hidden.clone()


def _run_norm_as_on_gpu(norm: nn.Module, hidden: Tensor) -> Tensor:
    return _NormOnGpu.apply(hidden)  # type: ignore[no-untyped-call, no-any-return]


def measure_layers(
    config: Any,
    dtype: torch.dtype,
    attention: str,
    lora: LoraSettings | None,
    *,
    on_gpu: bool = True,
    trust_remote_code: bool = False,
) -> LayerMemory:
    """Run one and two layers of a backbone and count what autograd saves.

    Args:
        config: the backbone's transformers config.
        dtype: dtype of weights and activations.
        attention: transformers' attention implementation.
        lora: what trains; None = only the input embeddings get gradients, as in stage 2.
        on_gpu: count the norms of a GPU instead of a CPU.
        trust_remote_code: whether code that comes with the backbone may run.
    """
    saved, trainable = [], []
    for layers in (1, 2):
        model = _build_layers(config, layers, dtype, attention, trust_remote_code)
        if lora is not None:
            make_trainable(model, **vars(lora), seed=0)
            if (masks := install_keyed_dropout(model)) is not None:
                masks.windows = torch.zeros(len(masks.windows), 1, TRIAL_TOKENS, dtype=torch.int64)
        model.train(lora is not None)
        decoder = PackedDecoder(model.get_decoder(), norm=_run_norm_as_on_gpu if on_gpu else run_rms_norm)
        saved.append(_count_saved(decoder, model.config.get_text_config().hidden_size, dtype))
        trainable.append(sum(param.numel() for param in model.parameters() if param.requires_grad))
    per_layer = saved[1] - saved[0]
    width = config.get_text_config().hidden_size * torch.empty((), dtype=dtype).element_size()
    return LayerMemory(
        per_layer / TRIAL_TOKENS, (saved[0] - per_layer) / TRIAL_TOKENS, float(width), trainable[1] - trainable[0]
    )


def _build_layers(config: Any, layers: int, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> Any:
    small_config = copy.deepcopy(config)
    text = small_config.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, _TINY_VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            small_config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return model.requires_grad_(False)


def _count_saved(decoder: PackedDecoder, width: int, dtype: torch.dtype) -> int:
    """Return the bytes that autograd saves in a forward pass over one row, without weights."""
    module = decoder.module
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeds = torch.zeros(TRIAL_TOKENS, width, dtype=dtype, requires_grad=True)
    positions = torch.arange(TRIAL_TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        hidden = run_tree(decoder, embeds, torch.full_like(positions, TAIL), positions, Mirrored.of([TRIAL_TOKENS]))
        assert hidden.requires_grad  # keeps the graph and its saved tensors alive until here
    return sum(saved.values())


def plan_memory(
    shape: DecoderShape,
    layers: LayerMemory,
    *,
    weights: int,
    other_trainable: int,
    tree_tokens: int,
    prefix_tokens: int,
    keys: int,
    element_size: int,
    checkpointing: bool,
    logits: int = 0,
    weight_shards: int = 1,
) -> MemoryPlan:
    """Return the memory of a step's largest micro-batch.

    Args:
        shape: the decoder's sizes.
        layers: result of ``measure_layers``.
        weights: bytes of the whole backbone.
        other_trainable: trainable parameters outside the layers.
        tree_tokens, prefix_tokens: tokens of the micro-batch with and without gradients.
        keys: keys that attention lays out, including copies of those before rows or branches.
        element_size: bytes of an element.
        checkpointing: whether activation checkpointing is on.
        logits: bytes of logits over the vocabulary, with their gradients.
        weight_shards: number of ranks that share the backbone's weights (ZeRO-3).
    """
    cache = 2 * shape.num_layers * shape.key_width * element_size * prefix_tokens
    layer_activations = layers.per_layer * tree_tokens
    # Laid-out keys and values are not saved, but recomputed in the backward pass.
    layer_working = layer_activations + 2 * shape.key_width * (keys - tree_tokens) * element_size
    if checkpointing:
        saved, working = shape.num_layers * layers.inputs * tree_tokens, layer_working
    else:
        saved, working = shape.num_layers * layer_activations, 0.0
    # In the backward pass the gradients of one layer's activations take about as much again.
    working += layer_working + logits
    trainable = layers.trainable * shape.num_layers + other_trainable
    return MemoryPlan(
        weights=weights // weight_shards,
        state=BYTES_PER_TRAINABLE * trainable,
        activations=int(saved + layers.outside * tree_tokens + cache),
        working=int(working),
    )


def find_fitting_tokens(plan: MemoryPlan, tokens: int, gpu_bytes: float) -> int:
    """Return how many tokens fit a GPU, given the plan for ``tokens`` tokens; 0 if the weights alone do not fit."""
    free = USABLE_SHARE["cuda"] * gpu_bytes - plan.weights - plan.state
    return max(0, int(free / ((plan.activations + plan.working) / tokens)))
