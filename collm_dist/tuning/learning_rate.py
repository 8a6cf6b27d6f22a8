"""The learning rate as a function of the step: linear warm-up, then a cosine."""

from __future__ import annotations

import math


def compute_learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, final_share: float) -> float:
    """Return the learning rate of update ``step`` (the first is 0).

    Args:
        step: update in question.
        peak: highest rate, reached after the warm-up.
        warmup_steps: updates of linear growth.
        total_steps: updates in all.
        final_share: the cosine ends at this share of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    share = final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * share
