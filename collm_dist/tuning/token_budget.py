"""Token budget of a micro-batch (``max_tokens_per_micro_batch: auto``): the most that fit, or fewer if faster.

Peak memory grows linearly with a micro-batch's tokens. Trials at sizes that surely fit give the slope, and the free
memory divided by the slope is the budget. Larger sizes are not tried, so no rank can run out of memory while its peers
wait. A GPU is fastest with as many tokens as fit. A CPU slows down when activations outgrow its caches, so it takes the
smallest trial that is nearly the fastest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_dist.data.prompts.micro_batches import count_longest, plan_micro_batches
from collm_dist.data.prompts.prompt_layout import PromptCollator, TokenCounts
from collm_dist.data.prompts.target_groups import find_groups
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.distributed import get_world_size
from collm_dist.llm.collm import CollmModel
from collm_dist.monitoring import PeakMeter
from collm_dist.prompt_batch import PromptBatch

TRIAL_TOKENS = {"cuda": (1024, 2048), "cpu": (512, 1024, 2048)}
# Share of the free memory; the rest is for fragmentation, libraries and, on a CPU, other processes.
USABLE_SHARE = {"cuda": 0.9, "cpu": 0.5}
# float32: gradient, two moments, ZeRO's copy of the weight.
BYTES_PER_TRAINABLE = 16
# Global batches have equal rows but not equal tokens. The margin avoids a second micro-batch for a few tokens, and a
# group that does not fit.
BATCH_TOKENS_MARGIN = 2
# A CPU takes the smallest trial within this factor of the fastest one's time, as it needs the least memory. Trials are
# timed in turn, in several rounds, and their best time counts: single passes differ by several percent.
SPEED_TOLERANCE = 1.03
TIMED_ROUNDS = 2


@dataclass(frozen=True)
class TokenBudget:
    """Result of the search.

    Attributes:
        tokens: most tokens of a micro-batch; the same on all ranks.
        bytes_per_token: growth of peak memory.
        free_bytes: memory that a micro-batch may take on this rank.
    """

    tokens: int
    bytes_per_token: float
    free_bytes: int


def find_token_budget(
    model: CollmModel,
    collator: PromptCollator,
    block: ContextBlock,
    device: torch.device,
    *,
    keep_groups: bool = False,
) -> TokenBudget:
    """Measure forward and backward passes at several sizes. Collective.

    Args:
        model: on the device and not yet wrapped by DeepSpeed; its gradients stay untouched.
        collator: lays out its prompts.
        block: a global batch; others are assumed to have up to ``BATCH_TOKENS_MARGIN`` times as many tokens.
        device: this process's device.
        keep_groups: whether the targets of a group stay in one micro-batch.
    """
    block = collator.cut_contexts(block)
    counts = collator.count_tokens(block)
    groups = find_groups(block) if keep_groups else None
    longest = count_longest(block, counts, groups) * (BATCH_TOKENS_MARGIN if keep_groups else 1)
    batch_tokens = BATCH_TOKENS_MARGIN * collator.collate(block, block).num_tokens
    model.train()
    trials = []
    for tokens in _list_trials(counts, device):
        pieces = plan_micro_batches(block, counts, 0, 1, max(tokens, longest), groups)
        batches = [collator.collate(piece, block).to(device) for piece in pieces]
        trials.append(_Trial(max(tokens, longest), batches, _measure_peak(model, batches, device)))
    free = _measure_free(model, device)
    slope = _fit_slope(trials)
    budget = min(max(free / slope, longest), max(batch_tokens, longest))
    if device.type == "cpu":
        # Timed after all have run once: the first pass of all is slow.
        rounds = [[_measure_seconds(model, trial.batches) for trial in trials] for _ in range(TIMED_ROUNDS)]
        seconds = [min(times) for times in zip(*rounds, strict=True)]
        budget = max(min(budget, trials[_choose_fastest(seconds)].choose_budget(batch_tokens)), longest)
    agreed = torch.tensor(float(budget), device=device)
    if get_world_size() > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return TokenBudget(int(agreed), slope, free)


@dataclass(frozen=True)
class _Trial:
    """A budget, the micro-batches that it makes of a global batch, and the peak memory of the largest."""

    max_tokens: int
    batches: list[PromptBatch]
    peak_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(batch.num_tokens for batch in self.batches)

    def choose_budget(self, batch_tokens: int) -> int:
        """Return the budget that divides other global batches alike; an undivided one stays undivided."""
        return batch_tokens if len(self.batches) == 1 else self.max_tokens


def _fit_slope(trials: list[_Trial]) -> float:
    """Return bytes per token from the two largest trials.

    At least the largest trial's mean, because the difference of two close measurements is noisy.
    """
    small, large = trials[-2:]
    mean_slope = large.peak_bytes / large.num_tokens
    if large.num_tokens == small.num_tokens:
        return max(mean_slope, 1.0)
    growth = (large.peak_bytes - small.peak_bytes) / (large.num_tokens - small.num_tokens)
    return max(growth, mean_slope, 1.0)


def _list_trials(counts: TokenCounts, device: torch.device) -> list[int]:
    """Return the budgets to try.

    On a CPU, time and memory depend on the tokens that train, so the sizes count only these. On a GPU, where a trial
    must surely fit, the sizes count all tokens.
    """
    share = 1.0
    if device.type == "cpu" and counts.prefix.any():
        trained = counts.tail.sum() + counts.branch.sum()
        share = float(trained / (trained + counts.prefix.sum()))
    return [round(tokens / share) for tokens in TRIAL_TOKENS[device.type]]


def _choose_fastest(seconds: list[float]) -> int:
    """Return the index of the first (smallest) trial that is nearly the fastest."""
    return next(index for index, time_taken in enumerate(seconds) if time_taken <= SPEED_TOLERANCE * min(seconds))


def _measure_peak(model: CollmModel, batches: list[PromptBatch], device: torch.device) -> int:
    largest = max(batches, key=lambda batch: batch.num_tokens)
    peak = 0
    for _ in range(2):  # the first pass warms up
        with PeakMeter(device) as meter:
            _run(model, largest)
        peak = max(peak, meter.extra_bytes)
    return peak


def _measure_seconds(model: CollmModel, batches: list[PromptBatch]) -> float:
    started = time.perf_counter()
    for batch in batches:
        _run(model, batch)
    return time.perf_counter() - started


def _run(model: CollmModel, batch: PromptBatch) -> None:
    trainable = [param for param in model.parameters() if param.requires_grad]
    loss = binary_cross_entropy_with_logits(model(batch), batch.labels)
    torch.autograd.grad(loss, trainable, allow_unused=True)


def _measure_free(model: CollmModel, device: torch.device) -> int:
    training_state = BYTES_PER_TRAINABLE * sum(param.numel() for param in model.parameters() if param.requires_grad)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // max(get_world_size(), 1)
    return int(USABLE_SHARE[device.type] * free) - training_state
