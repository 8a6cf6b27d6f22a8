"""Gated feed-forward networks that keep less for the backward pass.

``down(act(gate(x)) * up(x))`` is what most decoders have (Shazeer, arXiv 2002.05202). Written so, autograd keeps three
numbers for each hidden unit: the gate, the activated gate and the other factor. Here it keeps two and activates the
gate again, which costs next to nothing beside the matrix products: a sixth less memory in stage 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP


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
        (of_gate,) = torch.autograd.grad(active, gate, gradient * up)
        return of_gate, gradient * active.detach(), None


def has_code_of(module: nn.Module, known_class: type[nn.Module]) -> bool:
    """Return whether a module computes what a known one does, to the letter, whatever its class is called.

    One whose ``forward`` somebody has replaced does not.
    """
    if "forward" in vars(module) or not hasattr(type(module).forward, "__code__"):
        return False
    code, known = type(module).forward.__code__, known_class.forward.__code__
    return (code.co_code, code.co_names, code.co_consts) == (known.co_code, known.co_names, known.co_consts)


def is_gated(network: nn.Module) -> bool:
    """Return whether a layer's network is a gated one."""
    return has_code_of(network, LlamaMLP)


def slim_down(network: nn.Module) -> None:
    """Make a gated network keep less, in place; leave any other as it is."""
    if is_gated(network):
        network.forward = functools.partial(_run, network)


def _run(network: Any, hidden: Tensor) -> Tensor:
    gate, up = network.gate_proj(hidden), network.up_proj(hidden)
    product = _GatedProduct.apply(gate, up, network.act_fn)  # type: ignore[no-untyped-call]
    return network.down_proj(product)  # type: ignore[no-any-return]
