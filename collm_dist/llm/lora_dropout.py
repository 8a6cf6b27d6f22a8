"""Dropout of an adapter's inputs whose masks follow from keys instead of call order.

The mask of a token is a function of the seed and step, of the token's owner (its context, in a branch its target, in
the header nothing), of its position in the prompt, and of the layer. So targets that share a context share its masks,
neither the division into micro-batches nor the number of processes changes them, and a layer that is recomputed drops
the same elements again.

Shapes: M tree tokens, S sites (adapted layers), W width of a site's input, R rank of the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from collm_dist.errors import ConfigError
from collm_dist.prompt_batch import PromptBatch
from collm_dist.random_keys import MaskPool, hash_tensor

_NUM_WINDOWS, _STEP, MAX_WIDTH = 1 << 18, 16, 1 << 16


class DropoutMasks:
    """The masks of one forward pass (and of its backward pass), for all sites of a model.

    Attributes:
        pool: the draws that masks are windows of.
        windows: (S, 1, M) the window of each token, at each site.
    """

    def __init__(self, probability: float, num_sites: int) -> None:
        """Draw the pool of masks.

        Args:
            probability: of dropping an element.
            num_sites: S.
        """
        self.pool = MaskPool(probability, num_windows=_NUM_WINDOWS, max_width=MAX_WIDTH, seed=0, step=_STEP)
        self.windows = torch.zeros(num_sites, 0, 0, dtype=torch.int64)

    def draw(self, batch: PromptBatch, key: int) -> None:
        """Set the masks of the pass over a micro-batch.

        Args:
            batch: on the model's device.
            key: of seed and step.
        """
        device = batch.tree_ids.device
        self.pool.move_to(device)
        targets, owners = batch.tree_targets, batch.context_keys[batch.tree_lengths.list_rows()]
        owners = torch.where(targets < 0, owners, batch.row_ids[targets.clamp(min=0)])
        tokens = hash_tensor(hash_tensor(owners + key) + batch.tree_positions)
        if len(batch.prefix_ids) == 0:
            header = torch.arange(len(batch.header_ids), device=device)
            tokens = torch.cat([hash_tensor(hash_tensor(torch.full_like(header, key)) + header), tokens])
        sites = torch.arange(len(self.windows), device=device)[:, None, None]
        self.windows = hash_tensor(hash_tensor(sites) + tokens) & (_NUM_WINDOWS - 1)

    def drop(self, values: Tensor, windows: Tensor) -> Tensor:
        """Drop elements of (1, M, W) values at a site with (1, M) ``windows``."""
        return values * self.pool.take(windows, values.shape[-1]) * self.scale

    @property
    def scale(self) -> float:
        """Factor of the elements that are kept."""
        return 1 / (1 - self.pool.probability)


class _DroppedMatmul(torch.autograd.Function):
    """Values with dropout, times a weight: (1, M, W), (R, W) -> (1, M, R).

    Autograd would save the dropped values and the masks. This saves the values, which all adapters of a layer's input
    share, and takes the masks from the pool again: an eighth less memory in stage 1.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, windows: Tensor, masks: DropoutMasks) -> Tensor:
        ctx.save_for_backward(values, weight, windows)
        ctx.masks = masks
        # Scaled after the matmul, where a token has few elements.
        return linear(values * masks.pool.take(windows, values.shape[-1]), weight) * masks.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, weight, windows = ctx.saved_tensors
        kept, scaled = ctx.masks.pool.take(windows, values.shape[-1]), gradient * ctx.masks.scale
        return (scaled @ weight) * kept, scaled[0].T @ (values * kept)[0], None, None


class DroppedLinear(nn.Module):
    """An adapter's first linear layer with dropout of its inputs; in evaluation mode without.

    A class of its own because compiled code is shared only by layers whose submodules are of the same classes.
    """

    site: Tensor

    def __init__(self, linear_layer: nn.Linear, masks: DropoutMasks, site: int) -> None:
        """Replace a linear layer.

        Args:
            linear_layer: (W -> R), without a bias; its weight is shared.
            masks: shared by all sites.
            site: number of the layer among those that drop.
        """
        super().__init__()
        self.weight = linear_layer.weight
        self.masks = masks
        # A tensor, so that one compiled layer serves all layers: a number would be compiled in as a constant.
        self.register_buffer("site", torch.tensor([site]), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """(1, M, W) -> (1, M, R), or (M, W) -> (M, R).

        Raises:
            ConfigError: the layer sees other tokens, as an expert of a mixture does.
        """
        if not self.training:
            return linear(values, self.weight)
        windows = self.masks.windows.index_select(0, self.site)[0]
        if values.shape[:-1].numel() != windows.numel():
            raise ConfigError(
                f"lora.dropout: a layer of lora.target_modules sees tokens in shape {tuple(values.shape[:-1])}, the "
                f"prompts have {tuple(windows.shape)}; set lora.dropout=0, or remove that layer from "
                "lora.target_modules"
            )
        rows = values.view(*windows.shape, -1)
        if torch.compiler.is_compiling():  # the compiler decides itself what to recompute
            products = linear(self.masks.drop(rows, windows), self.weight)
        else:
            products = _DroppedMatmul.apply(rows, self.weight, windows, self.masks)  # type: ignore[no-untyped-call]
        return products.view(*values.shape[:-1], -1)


def install_keyed_dropout(backbone: nn.Module) -> DropoutMasks | None:
    """Replace the dropout of an adapter by keyed dropout, once, and return its masks; None if nothing drops.

    Args:
        backbone: with or without peft's layers.
    """
    installed = [module for module in backbone.modules() if isinstance(module, DroppedLinear)]
    if installed:
        return installed[0].masks
    layers: list[Any] = [module for module in backbone.modules() if hasattr(module, "lora_dropout")]
    adapters = [(layer, name, dropout) for layer in layers for name, dropout in layer.lora_dropout.items()]
    dropping = [(layer, name, dropout.p) for layer, name, dropout in adapters if isinstance(dropout, nn.Dropout)]
    if not dropping:
        return None
    masks = DropoutMasks(dropping[0][2], len(dropping))
    for site, (layer, name, _) in enumerate(dropping):
        layer.lora_dropout[name] = nn.Identity()
        layer.lora_A[name] = DroppedLinear(layer.lora_A[name], masks, site)
    return masks
