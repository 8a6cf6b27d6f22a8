"""Settings of the report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from collm_dist.config.section import Section, operational, optional


class EvaluationConfig(Section):
    """The report."""

    splits: tuple[Literal["valid", "test"], ...] = Field(
        ("valid", "test"), min_length=1, description="Splits in the report."
    )
    max_users: int | None = Field(None, ge=1, description="Evaluate this many users, chosen by hash; default: all.")
    max_contexts: int | None = optional(
        "Evaluate this many contexts of each split (a user after a number of likes, with all targets), chosen by hash "
        "after max_users; default: all. In the same time it covers more users than max_users alone.",
        ge=1,
    )
    train_contexts: int = Field(
        500,
        ge=0,
        description="Training contexts on which stage 1 is also scored, to show how much it has memorized; only if it "
        "has seen all training rows.",
    )
    bootstrap_samples: int = Field(
        1000, ge=0, description="Bootstrap resamples of the users for each interval; 0: no intervals."
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="Coverage of the intervals.")
    num_candidates: int = Field(
        100, ge=2, description="implicit: candidates among which each positive is ranked, itself included."
    )
    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 20), description="k of NDCG@k and HR@k.")
    slots_ablation: bool = Field(
        True, description="Also report stage 2 with slots shuffled between rows, and the slots without the LLM."
    )
    recipe: Literal["ML-1M", "Amazon-Book"] | None = operational(
        None,
        "The paper's recipe that the configuration follows; the report then lists every setting that deviates from it. "
        "Set in configs/paper_*.yaml, and so in configurations that build on them.",
    )
    max_tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = operational(
        "auto", "Maximum number of tokens in a forward pass. auto: 16384 on a GPU, 2048 on a CPU."
    )
