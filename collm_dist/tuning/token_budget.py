"""Token budget of a micro-batch (``max_tokens_per_micro_batch: auto``): the most that fit, or fewer if faster.

Peak memory grows linearly with a micro-batch's tokens. Trials at sizes that surely fit give the slope, and the free
memory divided by the slope is the budget. Larger sizes are not tried, so no rank can run out of memory while its peers
wait. A GPU is fastest with as many tokens as fit. A CPU slows down when activations outgrow its caches, so it takes the
smallest trial that is nearly the fastest. The trials take no longer than a few steps.
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
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.distributed import get_world_size
from collm_dist.llm.collm import CollmModel
from collm_dist.monitoring import PeakMeter
from collm_dist.phases import Phase, show_phase
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
# timed in turn and their best time counts, because single passes differ by several percent.
SPEED_TOLERANCE = 1.03
TIMED_ROUNDS = 2
# No further round if the trials would compute more tokens than this many steps: training is waiting.
TRIAL_STEPS = 3
# A batch of less than so many times a trial's tokens is tried whole instead.
_NEARLY_WHOLE = 1.5


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
    trials = _plan_trials(collator, block, counts, longest, groups, device)
    with show_phase("max_tokens_per_micro_batch: trying sizes", unit="passes") as phase:
        _measure_trials(model, trials, device, phase)
    free = _measure_free(model, device)
    slope = _fit_slope(trials)
    budget = min(max(free / slope, longest), max(batch_tokens, longest))
    if device.type == "cpu":
        fastest = trials[_choose_fastest([trial.estimate_seconds() for trial in trials])]
        budget = max(min(budget, fastest.choose_budget(batch_tokens)), longest)
    agreed = torch.tensor(float(budget), device=device)
    if get_world_size() > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return TokenBudget(int(agreed), slope, free)


@dataclass
class _Trial:
    """A budget and the micro-batches that it makes of a global batch, of which the largest is run.

    Attributes:
        max_tokens: the budget.
        largest: the largest micro-batch, on the device.
        sizes: tokens of each micro-batch.
        peak_bytes: most memory of a pass.
        seconds: of the fastest pass but the first, which is slow.
    """

    max_tokens: int
    largest: PromptBatch
    sizes: list[int]
    peak_bytes: int = 0
    seconds: float = float("inf")

    @property
    def num_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.largest.num_tokens

    def estimate_seconds(self) -> float:
        """Return the time of the global batch, at the speed of its largest micro-batch."""
        return self.seconds * sum(self.sizes) / self.num_tokens

    def choose_budget(self, batch_tokens: int) -> int:
        """Return the budget that divides other global batches alike; an undivided one stays undivided."""
        return batch_tokens if len(self.sizes) == 1 else self.max_tokens


def _plan_trials(
    collator: PromptCollator,
    block: ContextBlock,
    counts: TokenCounts,
    longest: int,
    groups: IntArray | None,
    device: torch.device,
) -> list[_Trial]:
    """Return the trials that differ: a whole batch is tried once, and not also a little less than it."""
    trials: list[_Trial] = []
    for tokens in _list_trials(counts, device):
        pieces = plan_micro_batches(block, counts, 0, 1, max(tokens, longest), groups)
        batches = [collator.collate(piece, block) for piece in pieces]
        largest = max(batches, key=lambda batch: batch.num_tokens)
        if len(pieces) == 1 and len(trials) > 1 and largest.num_tokens < _NEARLY_WHOLE * trials[-1].max_tokens:
            trials.pop()
        trials.append(_Trial(max(tokens, longest), largest.to(device), [batch.num_tokens for batch in batches]))
        if len(pieces) == 1:
            break
    return trials


def _measure_trials(model: CollmModel, trials: list[_Trial], device: torch.device, phase: Phase) -> None:
    """Run each trial twice, and on a CPU again for the time unless that would take too long."""
    round_tokens, step_tokens = sum(trial.num_tokens for trial in trials), sum(trials[-1].sizes)
    for number in range(1 + TIMED_ROUNDS):
        takes_too_long = (number + 1) * round_tokens > TRIAL_STEPS * step_tokens
        if number > 1 and (device.type != "cpu" or len(trials) == 1 or takes_too_long):
            return
        for trial in trials:
            with PeakMeter(device) as meter:
                started = time.perf_counter()
                _run(model, trial.largest)
                seconds = time.perf_counter() - started
            trial.peak_bytes = max(trial.peak_bytes, meter.extra_bytes)
            if number:
                trial.seconds = min(trial.seconds, seconds)
            phase.advance()


def _fit_slope(trials: list[_Trial]) -> float:
    """Return bytes per token from the two largest trials.

    At least the largest trial's mean, because the difference of two close measurements is noisy.
    """
    small, large = trials[-2:] if len(trials) > 1 else (trials[0], trials[0])
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
