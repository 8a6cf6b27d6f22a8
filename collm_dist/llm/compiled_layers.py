"""``torch.compile`` of the decoder's layers, for the shared-context forward pass.

One layer is compiled, not the whole decoder: all layers run the same code, so a single graph serves them, and compiling
takes as long for 80 layers as for two. What would tell the layers apart is kept out of the graph: a layer is handed the
keys and values that are its own instead of a cache with a place for each layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

# Graphs of one layer class: with and without gradients, with and without a prefix, and of one row, which torch never
# treats like several. What comes beyond the limit runs uncompiled.
MAX_GRAPHS = 24


class _LayerPrefix:
    """A layer's own keys and values of a prefix, which are read (see ``FrozenCache``)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _LayerRecord:
    """Takes down the keys and values that a layer computes of a prefix."""

    def __init__(self) -> None:
        self.found: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.found = key_states, value_states
        return key_states, value_states


def compile_layers(decoder: nn.Module, backend: str = "inductor") -> None:
    """Make every decoder layer run compiled, in place; the first passes of each kind take seconds to minutes.

    Random numbers are those of the uncompiled layer, so that dropout is the same.

    Args:
        decoder: the model below the language-modelling head; all its layers of one class. Its weights must be whole
            (not partitioned by ZeRO-3, which gathers them by hooks that end a graph).
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    layers: Any = decoder.layers
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    compiled = torch.compile(type(layers[0]).forward, dynamic=True, backend=backend, options=options)
    for index, layer in enumerate(layers):
        layer.forward = functools.partial(_run_layer, compiled, layer, index)


def _run_layer(
    compiled: Any, layer: nn.Module, index: int, *args: Any, past_key_values: Any = None, **kwargs: Any
) -> Any:
    """Run a layer with its part of the cache."""
    if past_key_values is None:
        return compiled(layer, *args, past_key_values=None, **kwargs)
    if index < len(past_key_values.layers) and past_key_values.layers[index].is_initialized:
        held = past_key_values.layers[index]
        return compiled(layer, *args, past_key_values=_LayerPrefix(held.keys, held.values), **kwargs)
    record = _LayerRecord()
    output = compiled(layer, *args, past_key_values=record, **kwargs)
    assert record.found is not None
    past_key_values.update(*record.found, index)
    return output
