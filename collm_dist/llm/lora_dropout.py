"""Dropout of an adapter's inputs whose masks follow from counters, not from the order of calls.

What a token loses is a function of the seed and step, of whose token it is (its context's, in a branch its row's, in
the header nobody's), of its position in the prompt, and of the layer. So targets that share a context share its masks,
and neither the division into micro-batches nor the number of processes changes them; a layer that is recomputed drops
the same again.

Shapes: M tree tokens, N targets, S sites (places in the model that drop), W numbers of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from collm_dist.errors import ConfigError
from collm_dist.prompt_batch import PromptBatch

# Hashing every number would cost more than the layer. So independent draws are made once, and a token takes the window
# of them that starts where its hash says. Windows start at multiples of 16 bytes, which a GPU copies at once: an H200
# took them 3 to 8 times as fast as from anywhere.
_NUM_STARTS, _STEP = 1 << 18, 16
MAX_WIDTH = 1 << 16


class DropoutMasks:
    """The masks of one forward pass (and of its backward pass), for all sites of a model.

    Attributes:
        probability: of dropping a number.
        pool: independent draws, True = kept.
        starts: (S, 1, M) which window of the pool each token takes, at each site.
    """

    def __init__(self, probability: float, num_sites: int) -> None:
        """Make the draws that masks are taken from; they are the same in every process and every run."""
        generator = torch.Generator().manual_seed(0)
        self.probability = probability
        self.pool = torch.rand(_NUM_STARTS * _STEP + MAX_WIDTH, generator=generator, device="cpu") >= probability
        self.starts = torch.zeros(num_sites, 0, 0, dtype=torch.int64)

    def draw(self, batch: PromptBatch, key: int) -> None:
        """Set the masks of the pass over a micro-batch.

        Args:
            batch: on the model's device.
            key: of seed and step.
        """
        device = batch.tree_ids.device
        self.pool = self.pool.to(device)
        targets, owners = batch.tree_targets, batch.context_keys[batch.tree_lengths.list_rows()]
        owners = torch.where(targets < 0, owners, batch.row_ids[targets.clamp(min=0)])
        tokens = _mix(_mix(owners + key) + batch.tree_positions)
        if len(batch.prefix_ids) == 0:
            header = torch.arange(len(batch.header_ids), device=device)
            tokens = torch.cat([_mix(_mix(torch.full_like(header, key)) + header), tokens])
        sites = torch.arange(len(self.starts), device=device)[:, None, None]
        self.starts = _mix(_mix(sites) + tokens) & (_NUM_STARTS - 1)

    def drop(self, values: Tensor, starts: Tensor) -> Tensor:
        """Drop from (1, M, W) values at a site whose windows are (1, M) ``starts``."""
        return values * self.take(values.shape[-1], starts) * self.scale

    def take(self, width: int, starts: Tensor) -> Tensor:
        """Return what is kept: (1, M) ``starts`` -> (1, M, width) bool."""
        return self.pool.as_strided((_NUM_STARTS, width), (_STEP, 1))[starts]

    @property
    def scale(self) -> float:
        """What kept numbers are multiplied by."""
        return 1 / (1 - self.probability)


class _DroppedProduct(torch.autograd.Function):
    """Values times their masks, times a weight: (1, M, W), (R, W) -> (1, M, R).

    Autograd would keep the dropped values and the masks. Kept are the values, which all adapters of a layer's input
    share, and the masks are taken once more: an eighth less memory in stage 1.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, starts: Tensor, masks: DropoutMasks) -> Tensor:
        ctx.save_for_backward(values, weight, starts)
        ctx.masks = masks
        # Scaled afterwards, where a token has few numbers.
        return linear(values * masks.take(values.shape[-1], starts), weight) * masks.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, weight, starts = ctx.saved_tensors
        kept, scaled = ctx.masks.take(values.shape[-1], starts), gradient * ctx.masks.scale
        return (scaled @ weight) * kept, scaled[0].T @ (values * kept)[0], None, None


class DroppedLinear(nn.Module):
    """An adapter's first product, of what is left of its inputs: numbers are zeroed as the masks say, and the others
    scaled by 1 / (1 - p). In evaluation mode the plain product.

    A class of its own, since compiled code is shared by layers whose parts are of one class, and by no others.
    """

    site: Tensor

    def __init__(self, product: nn.Linear, masks: DropoutMasks, site: int) -> None:
        """Take a product's place.

        Args:
            product: (W -> R), without a bias; its weight is shared.
            masks: shared by all sites.
            site: number of the place.
        """
        super().__init__()
        self.weight = product.weight
        self.masks = masks
        # A tensor, so that a compiled layer serves all layers: a number would be compiled in.
        self.register_buffer("site", torch.tensor([site]), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """(1, M, W) -> (1, M, R).

        Raises:
            ConfigError: the layer sees tokens in another arrangement, as an expert of a mixture does.
        """
        if not self.training:
            return linear(values, self.weight)
        starts = self.masks.starts.index_select(0, self.site)[0]
        if values.shape[:-1] != starts.shape:
            raise ConfigError(
                f"lora.dropout: a layer of lora.target_modules sees tokens as {tuple(values.shape[:-1])}, the prompts "
                f"are {tuple(starts.shape)}; set lora.dropout=0, or leave that layer out"
            )
        if torch.compiler.is_compiling():  # finds by itself what is cheap to compute again
            return linear(self.masks.drop(values, starts), self.weight)
        return _DroppedProduct.apply(  # type: ignore[no-untyped-call, no-any-return]
            values, self.weight, starts, self.masks
        )


def install_keyed_dropout(backbone: nn.Module) -> DropoutMasks | None:
    """Put ours in the place of an adapter's dropout; returns its masks, None where nothing drops.

    Args:
        backbone: with peft's layers in it or without.
    """
    ours = [module for module in backbone.modules() if isinstance(module, DroppedLinear)]
    if ours:
        return ours[0].masks
    layers: list[Any] = [module for module in backbone.modules() if hasattr(module, "lora_dropout")]
    places = [(layer, name, dropout) for layer in layers for name, dropout in layer.lora_dropout.items()]
    plain = [(layer, name, dropout.p) for layer, name, dropout in places if isinstance(dropout, nn.Dropout)]
    if not plain:
        return None
    masks = DropoutMasks(plain[0][2], len(plain))
    for site, (layer, name, _) in enumerate(plain):
        layer.lora_dropout[name] = nn.Identity()
        layer.lora_A[name] = DroppedLinear(layer.lora_A[name], masks, site)
    return masks


def _mix(keys: Tensor) -> Tensor:
    """Return int64 hashes: the finaliser of SplitMix64, whose shifts are logical and whose products wrap around."""
    keys = keys + -0x61C8864680B583EB
    keys = (keys ^ ((keys >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    keys = (keys ^ ((keys >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))
