"""Learning rate schedule: linear warm-up, then cosine decay."""

from __future__ import annotations

import math


def compute_learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, final_share: float) -> float:
    """Return the learning rate of a step.

    Args:
        step: number of the step, from 0.
        peak: highest learning rate, reached after the warm-up.
        warmup_steps: steps of linear growth.
        total_steps: all steps.
        final_share: share of the peak at which the cosine ends.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    share = final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * share
