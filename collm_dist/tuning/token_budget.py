"""``max_tokens_per_micro_batch: auto``: the most tokens that fit a forward and backward pass, or fewer if faster.

Peak memory grows in proportion to a micro-batch's tokens. Trials at sizes that surely fit give the line; where
it meets the memory that is free is the budget. Nothing is tried that might not fit, so no process can run out of memory
while others wait for it. A GPU is fastest with as many tokens as fit. A CPU is not, since activations that outgrow its
caches come from memory again and again: there the smallest of the trials that is nearly the fastest is taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import PromptCollator, TokenCounts
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.distributed import get_world_size
from collm_dist.llm.collm import CollmModel
from collm_dist.monitoring import PeakMeter
from collm_dist.prompt_batch import PromptBatch

TRIAL_TOKENS = {"cuda": (1024, 2048), "cpu": (512, 1024, 2048)}
# Left for fragmentation, for what libraries take, and on a CPU for everybody else on the machine.
USABLE_SHARE = {"cuda": 0.9, "cpu": 0.5}
# float32 gradient, two moments and ZeRO's float32 copy.
BYTES_PER_TRAINABLE = 16
# Global batches have as many rows, but not as many tokens; one beyond the budget would be divided for a few tokens.
BATCH_TOKENS_MARGIN = 2
# A CPU takes the smallest of the trials that takes at most so many times as long as the fastest, since memory goes with
# it. Each is timed so often, in turn, and its best time counts: one pass differs from the next by several percent.
SPEED_TOLERANCE = 1.03
TIMED_ROUNDS = 2


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
    """Measure forward and backward passes at several sizes. Collective.

    Args:
        model: on the device and not yet wrapped; its gradients stay untouched.
        collator: of its prompts.
        block: a global batch; others are taken to have up to ``BATCH_TOKENS_MARGIN`` times as many tokens.
        device: of this process.
    """
    block = collator.cut_contexts(block)
    counts = collator.count_tokens(block)
    rows = counts.header + counts.prefix + counts.tail
    longest = int((rows[block.target_contexts] + counts.branch).max())
    batch_tokens = BATCH_TOKENS_MARGIN * collator.collate(block, block).num_tokens
    model.train()
    trials = []
    for tokens in _list_trials(counts, device):
        pieces = plan_micro_batches(block, counts, 0, 1, max(tokens, longest))
        batches = [collator.collate(piece, block).to(device) for piece in pieces]
        trials.append(_Trial(max(tokens, longest), batches, _measure_peak(model, batches, device)))
    free = _measure_free(model, device)
    slope = _fit_slope(trials)
    budget = min(max(free / slope, longest), max(batch_tokens, longest))
    if device.type == "cpu":
        # Timed once all have run: whichever was the first would be the slowest, with everything new to it.
        rounds = [[_measure_seconds(model, trial.batches) for trial in trials] for _ in range(TIMED_ROUNDS)]
        seconds = [min(times) for times in zip(*rounds, strict=True)]
        budget = min(budget, trials[_choose_fastest(seconds)].choose_budget(batch_tokens))
    agreed = torch.tensor(float(budget), device=device)
    if get_world_size() > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return TokenBudget(int(agreed), slope, free)


@dataclass(frozen=True)
class _Trial:
    """A budget, the micro-batches that it makes of a global batch, and what the largest took at its peak."""

    max_tokens: int
    batches: list[PromptBatch]
    peak_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(batch.num_tokens for batch in self.batches)

    def choose_budget(self, batch_tokens: int) -> int:
        """Return the tokens that do to other global batches what was done here: a whole one is not divided at all."""
        return batch_tokens if len(self.batches) == 1 else self.max_tokens


def _fit_slope(trials: list[_Trial]) -> float:
    """Return bytes a token from the two largest trials.

    Never less than a line through zero would say of the larger one: two near measurements may be noisy.
    """
    small, large = trials[-2:]
    mean_slope = large.peak_bytes / large.num_tokens
    if large.num_tokens == small.num_tokens:
        return max(mean_slope, 1.0)
    growth = (large.peak_bytes - small.peak_bytes) / (large.num_tokens - small.num_tokens)
    return max(growth, mean_slope, 1.0)


def _list_trials(counts: TokenCounts, device: torch.device) -> list[int]:
    """Return the budgets to be tried.

    On a CPU time and memory are up to the tokens that train, so these are as many whatever share of a micro-batch they
    are; a GPU, where a trial must surely fit, is asked about all tokens.
    """
    share = 1.0
    if device.type == "cpu" and counts.prefix.any():
        trained = counts.tail.sum() + counts.branch.sum()
        share = float(trained / (trained + counts.prefix.sum()))
    return [round(tokens / share) for tokens in TRIAL_TOKENS[device.type]]


def _choose_fastest(seconds: list[float]) -> int:
    """Return the first of the trials that is nearly the fastest; the smallest stands first."""
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
