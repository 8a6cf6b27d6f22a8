"""RMS norms by PyTorch's one kernel for GPUs.

Written out, as in transformers, a norm (Zhang and Sennrich, arXiv 1910.07467) starts eight kernels on the way forth and
more on the way back, and keeps its input in float32. A small model's step is made of little else than starting kernels.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from collm_dist.llm.packed.gated_mlp import has_code_of


def fuse_norm(module: nn.Module) -> None:
    """Let a module that computes what Llama's norm does use the kernel on a GPU, in place; leave any other as it is."""
    if has_code_of(module, LlamaRMSNorm):
        module.forward = functools.partial(_run, module)


def is_fused(module: nn.Module) -> bool:
    """Return whether a module is a norm that was changed."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _run


def _run(norm: Any, hidden: Tensor) -> Tensor:
    if not hidden.is_cuda or hidden.dtype != norm.weight.dtype:
        return type(norm).forward(norm, hidden)  # type: ignore[no-any-return]
    return normalize(norm, hidden)


def normalize(norm: Any, hidden: Tensor) -> Tensor:
    """(..., D) -> (..., D). In bfloat16 it rounds once, where the module rounds before its weights and after them."""
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
