"""Global batches made ready for this process: planned, laid out, and on their way to the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prefetch import prefetch
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.slot_codes import Masking
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.distributed import get_rank, get_world_size
from collm_dist.prompt_batch import PromptBatch


@dataclass(frozen=True)
class StepBatch:
    """A global batch and this process's share of it.

    Attributes:
        block: the rows of all processes.
        micro_batches: on the host, page-locked if they go to a GPU; as many on every process.
    """

    block: ContextBlock
    micro_batches: list[PromptBatch]


def iter_step_batches(
    blocks: Iterator[ContextBlock],
    collator: PromptCollator,
    max_tokens: int,
    device: torch.device,
    masking: Masking | None = None,
) -> Iterator[StepBatch]:
    """Lay out global batches ahead of the model, in a thread.

    Args:
        blocks: the global batches.
        collator: of the prompts.
        max_tokens: most tokens of a micro-batch.
        device: where the micro-batches go.
        masking: in training only.

    Raises:
        ConfigError: a single row exceeds ``max_tokens``.
    """
    return prefetch(_lay_out(block, collator, max_tokens, device, masking) for block in blocks)


def _lay_out(
    block: ContextBlock, collator: PromptCollator, max_tokens: int, device: torch.device, masking: Masking | None
) -> StepBatch:
    block = collator.cut_contexts(block)
    pieces = plan_micro_batches(block, collator.count_tokens(block), get_rank(), get_world_size(), max_tokens)
    batches = [collator.collate(piece, block, masking) for piece in pieces]
    return StepBatch(block, [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches)
