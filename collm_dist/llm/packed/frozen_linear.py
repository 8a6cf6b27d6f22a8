"""Products with frozen weights on an AMD processor, by the faster of the two libraries that PyTorch brings for them.

PyTorch multiplies float32 matrices by Intel's MKL, and keeps oneDNN for convolutions and compiled inference. With the
shapes of a small language model's layers oneDNN takes 0.76 to 0.92 of MKL's time on an AMD processor, forth and back
(benchmarks/frozen_products.py). Intel's own were not measured, and stay with MKL.

oneDNN makes a kernel for each number of tokens, in a millisecond, and would keep a thousand of them, 0.6 GB. So it is
used where layers enough share a kernel, and in processes that keep few (``heap.KERNEL_CACHES``).

Shapes: I numbers of an input, O of an output.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from collm_dist.heap import KERNEL_CACHES

# Numbers in all weights of one shape, from which on a kernel of their own pays.
LEAST_NUMBERS = 1 << 21
_CPU_INFO = Path("/proc/cpuinfo")


class _FrozenProduct(torch.autograd.Function):
    """(..., I) -> (..., O), with a gradient for the input alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return multiply(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return multiply(gradient, weight.t()), None, None


def multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., I), (O, I) and (O,) -> (..., O), by oneDNN; float32 on a CPU alone."""
    # PyTorch has no other way to it that takes plain tensors; this is what its compiler calls.
    found: Tensor = torch.ops.mkldnn._linear_pointwise(hidden.contiguous(), weight, bias, "none", [], "")
    return found


@functools.cache
def _is_faster() -> bool:
    libraries = torch.backends.mkl, torch.backends.mkldnn
    return all(one.is_available() for one in libraries) and _CPU_INFO.exists() and "AMD" in _CPU_INFO.read_text("utf-8")


def hasten_products(modules: Iterable[nn.Module]) -> None:
    """Let linear modules use oneDNN wherever it is faster and they are frozen, in float32 and on a CPU, in place.

    Left as they are: modules of other classes, those that somebody has given code of their own, and those with too few
    alike.
    """
    if not _is_faster() or not KERNEL_CACHES.keys() <= os.environ.keys():
        return
    plain = [one for one in modules if type(one) is nn.Linear and "forward" not in vars(one)]
    counts = Counter(one.weight.shape for one in plain)
    for one in plain:
        if counts[one.weight.shape] * one.weight.numel() >= LEAST_NUMBERS:
            one.forward = functools.partial(_run, one)  # type: ignore[method-assign]


def is_hastened(module: nn.Module) -> bool:
    """Return whether a module was changed."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _run


def _run(module: nn.Linear, hidden: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if hidden.device.type != "cpu" or not is_frozen or {hidden.dtype, weight.dtype} != {torch.float32}:
        return linear(hidden, weight, bias)
    return _FrozenProduct.apply(hidden, weight, bias)  # type: ignore[no-untyped-call, no-any-return]
