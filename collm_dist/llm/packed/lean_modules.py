"""Forward functions of known transformers modules that need less memory or fewer kernels, with the same results.

A gated MLP (Shazeer, arXiv 2002.05202), ``down(act(gate(x)) * up(x))``: autograd saves three numbers for each hidden
unit, the gate, the activated gate and the other factor. ``run_gated_mlp`` saves two and activates the gate again, which
costs next to nothing beside the matmuls: a sixth less memory in stage 1.

An RMS norm (Zhang and Sennrich, arXiv 1910.07467): written out, as in transformers, it starts eight kernels in the
forward pass and more in the backward pass, and saves its input in float32. ``run_rms_norm`` is one kernel on a GPU. A
small model's step takes little more time than starting its kernels.

Shapes: F hidden units of an MLP, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from transformers.models.cohere.modeling_cohere import CohereMLP
from transformers.models.cohere2.modeling_cohere2 import Cohere2MLP
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5MLP, Ernie4_5RMSNorm
from transformers.models.exaone4.modeling_exaone4 import Exaone4MLP, Exaone4RMSNorm
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.glm4.modeling_glm4 import Glm4RMSNorm
from transformers.models.granite.modeling_granite import GraniteMLP, GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.ministral.modeling_ministral import MinistralMLP, MinistralRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoMLP
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP
from transformers.models.olmo3.modeling_olmo3 import Olmo3MLP
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP, SmolLM3RMSNorm

# Classes whose forward is Llama's to the letter; tests/unit/test_lean_modules.py compares the source.
GATED_MLPS: tuple[type[nn.Module], ...] = (
    Cohere2MLP,
    CohereMLP,
    Ernie4_5MLP,
    Exaone4MLP,
    Gemma2MLP,
    Gemma3MLP,
    GemmaMLP,
    GraniteMLP,
    LlamaMLP,
    MinistralMLP,
    MistralMLP,
    Olmo2MLP,
    Olmo3MLP,
    OlmoMLP,
    Qwen2MLP,
    Qwen3MLP,
    SmolLM3MLP,
)
RMS_NORMS: tuple[type[nn.Module], ...] = (
    Ernie4_5RMSNorm,
    Exaone4RMSNorm,
    Glm4RMSNorm,
    GraniteRMSNorm,
    LlamaRMSNorm,
    MinistralRMSNorm,
    MistralRMSNorm,
    MixtralRMSNorm,
    Phi3RMSNorm,
    Qwen2RMSNorm,
    Qwen3MoeRMSNorm,
    Qwen3RMSNorm,
    SmolLM3RMSNorm,
)


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up, both (..., F)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            active = ctx.activation(gate)
        (gate_gradient,) = torch.autograd.grad(active, gate, gradient * up)
        return gate_gradient, gradient * active.detach(), None


def run_gated_mlp(mlp: Any, hidden: Tensor) -> Tensor:
    """Run one of the ``GATED_MLPS``: (..., D) -> (..., D)."""
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    product = _GatedProduct.apply(gate, up, mlp.act_fn)  # type: ignore[no-untyped-call]
    return mlp.down_proj(product)  # type: ignore[no-any-return]


def run_rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """Run one of the ``RMS_NORMS``, with PyTorch's kernel on a GPU: (..., D) -> (..., D)."""
    if not hidden.is_cuda or hidden.dtype != norm.weight.dtype:
        return type(norm).forward(norm, hidden)  # type: ignore[no-any-return]
    return fuse_rms_norm(norm, hidden)


def fuse_rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """(..., D) -> (..., D). In bfloat16 it rounds once, where the module rounds before its weights and after them."""
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
