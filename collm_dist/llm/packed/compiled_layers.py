"""``torch.compile`` of the decoder's layers, for the shared-context forward pass.

One layer is compiled, not the whole decoder: all layers run the same code, so the same graphs serve them, and compiling
takes as long for 80 layers as for two. Attention is left as it is: it comes in any number of blocks, and is made of
PyTorch's kernels anyway. So a layer has three graphs, of what is before attention, behind it, and of its network.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from collm_dist.llm.packed.decoder import find_layers, prepare_decoder, restore_modules

# Graphs of one piece of code: with and without gradients, of a first layer, of one token, which torch never treats like
# several. What comes beyond the limit runs uncompiled.
MAX_GRAPHS = 24


def compile_layers(decoder: nn.Module, backend: str = "inductor") -> None:
    """Make every decoder layer run compiled, in place; the first passes of each kind take seconds to minutes.

    Random numbers are those of the uncompiled layer, so that dropout is the same.

    Args:
        decoder: the model below the language-modelling head; all its layers of one class. Its weights must be whole
            (not partitioned by ZeRO-3, which gathers them by hooks that end a graph).
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    prepare_decoder(decoder)
    layers: Any = find_layers(decoder)
    # A last network that leaves some tokens out would need graphs of its own; a compiler finds by itself what is cheap
    # to compute again.
    restore_modules(decoder)
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    compiled = torch.compile(type(layers[0]).forward, dynamic=True, backend=backend, options=options)
    for layer in layers:
        layer.forward = functools.partial(compiled, layer)
