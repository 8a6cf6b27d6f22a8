"""``max_tokens_per_micro_batch: auto``: the most tokens that fit a forward and backward pass.

Peak memory grows in proportion to a micro-batch's padded tokens. Two trials at sizes that surely fit give the line;
where it meets the memory that is free is the budget. Nothing is tried that might not fit, so no process can run out of
memory while others wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_dist.data.collate import PromptCollator
from collm_dist.data.context_block import ContextBlock
from collm_dist.data.micro_batches import plan_micro_batches
from collm_dist.llm.collm import CollmModel
from collm_dist.monitoring import PeakMeter
from collm_dist.prompt_batch import PromptBatch
from collm_dist.tuning.engine import get_world_size

TRIAL_TOKENS = (1024, 2048)
# Left for fragmentation, for what libraries take, and on a CPU for everybody else on the machine.
USABLE_SHARE = {"cuda": 0.9, "cpu": 0.5}
# float32 gradient, two moments and ZeRO's float32 copy.
BYTES_PER_TRAINABLE = 16


@dataclass(frozen=True)
class TokenBudget:
    """What was found.

    Attributes:
        tokens: of a micro-batch at most; the same on all processes.
        bytes_per_token: that the peak grows by.
        free_bytes: that a micro-batch may take on this process.
    """

    tokens: int
    bytes_per_token: float
    free_bytes: int


def find_token_budget(
    model: CollmModel, collator: PromptCollator, block: ContextBlock, device: torch.device
) -> TokenBudget:
    """Measure two forward and backward passes. Collective.

    Args:
        model: on the device and not yet wrapped; its gradients stay untouched.
        collator: of its prompts.
        block: a global batch; no micro-batch can be larger.
        device: of this process.
    """
    block = collator.cut_contexts(block)
    counts = collator.count_tokens(block)
    rows = counts.prefix + counts.tail
    longest = int((rows[block.target_contexts] + counts.branch).max())
    whole = sum(_count_padded(collator.collate(block, block)))
    sizes, peaks = [], []
    for tokens in TRIAL_TOKENS:
        pieces = plan_micro_batches(block, counts, 0, 1, max(tokens, longest))
        batches = [collator.collate(piece, block) for piece in pieces]
        batch = max(batches, key=lambda one: sum(_count_padded(one)))
        sizes.append(sum(_count_padded(batch)))
        peaks.append(_measure_peak(model, batch.to(device), device))
    growth = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else 0.0
    # Never less than a straight line through zero would say of the larger trial: two near measurements may be noisy.
    slope = max(growth, peaks[1] / sizes[1])
    free = _measure_free(model, device)
    found = torch.tensor(float(min(max(free / max(slope, 1.0), longest), max(whole, longest))), device=device)
    if get_world_size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return TokenBudget(int(found), slope, free)


def _count_padded(batch: PromptBatch) -> tuple[int, int]:
    return batch.prefix_ids.numel(), batch.tree_ids.numel()


def _measure_peak(model: CollmModel, batch: PromptBatch, device: torch.device) -> int:
    """Return the bytes that a forward and backward pass takes at its peak."""
    model.train()
    trainable = [one for one in model.parameters() if one.requires_grad]
    with PeakMeter(device) as meter:
        loss = binary_cross_entropy_with_logits(model(batch), batch.labels)
        torch.autograd.grad(loss, trainable, allow_unused=True)
    return meter.extra_bytes


def _measure_free(model: CollmModel, device: torch.device) -> int:
    later = BYTES_PER_TRAINABLE * sum(one.numel() for one in model.parameters() if one.requires_grad)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // max(get_world_size(), 1)
    return int(USABLE_SHARE[device.type] * free) - later
