"""Global batches as this rank's micro-batches, laid out ahead of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prefetch import prefetch
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.slot_codes import Masking
from collm_dist.data.prompts.target_groups import find_groups
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.distributed import get_rank, get_world_size
from collm_dist.prompt_batch import PromptBatch


@dataclass(frozen=True)
class StepBatch:
    """A global batch and this rank's part of it.

    Attributes:
        block: the rows of all ranks, contexts divided at time cuts.
        micro_batches: this rank's micro-batches on the host, in pinned memory if they go to a GPU; every rank has the
            same number.
        groups: (N,) groups of the block's targets; None if no loss compares targets.
    """

    block: ContextBlock
    micro_batches: list[PromptBatch]
    groups: IntArray | None = None


def iter_step_batches(
    blocks: Iterator[ContextBlock],
    collator: PromptCollator,
    max_tokens: int,
    device: torch.device,
    masking: Masking | None = None,
    *,
    keep_groups: bool = False,
) -> Iterator[StepBatch]:
    """Yield global batches as micro-batches, prefetched in a thread.

    Args:
        blocks: the global batches.
        collator: lays out the prompts.
        max_tokens: most tokens of a micro-batch.
        device: device that the micro-batches go to.
        masking: masking of slots, for training.
        keep_groups: whether the targets of a group stay in one micro-batch, for a loss that compares them.

    Raises:
        ConfigError: a single row or group exceeds ``max_tokens``.
    """
    return prefetch(_lay_out(block, collator, max_tokens, device, masking, keep_groups) for block in blocks)


def _lay_out(
    block: ContextBlock,
    collator: PromptCollator,
    max_tokens: int,
    device: torch.device,
    masking: Masking | None,
    keep_groups: bool,
) -> StepBatch:
    block = collator.cut_contexts(block)
    groups = find_groups(block) if keep_groups else None
    counts = collator.count_tokens(block)
    pieces = plan_micro_batches(block, counts, get_rank(), get_world_size(), max_tokens, groups)
    batches = [collator.collate(piece, block, masking, groups) for piece in pieces]
    return StepBatch(block, [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches, groups)
