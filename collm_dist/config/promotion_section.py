"""Settings of the decision to replace the run in use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collm_dist.config.section import Section, operational


class PromotionConfig(Section):
    """Rule by which a run replaces the run in use, decided on today's test rows."""

    min_paired_difference: float | None = operational(
        None,
        "Minimum for the lower end of the interval of stage 2 minus the baseline, on the same test rows: 0 "
        "demands evidence of a gain, -0.005 tolerates a possible loss of that size. Default: no promotion.",
    )
    metric: str = operational(
        "auc",
        "auc, uauc, ndcg@k or hr@k. Default: auc; dataset.feedback implicit: ndcg@k with the middle one of "
        "evaluation.cutoffs.",
        pattern=r"^(auc|uauc|(ndcg|hr)@\d+)$",
    )
    baseline: Literal[
        "previous",
        "anchor",
        "blend",
        "cf",
        "stage1",
        "slots_without_llm",
        "as_of_logistic",
        "bias_logistic",
        "popularity",
        "text_similarity",
    ] = Field(
        "previous",
        description="previous: stage 2 of dataset.extend_from, scored on the same rows. anchor: the score "
        "that the language model adds to (anchor.kind). Otherwise a row of the report's table.",
    )
    pointer: str | None = operational(
        None,
        "Symbolic link to the run in use, moved by a promotion; default: 'current' beside run.dir. If "
        "dataset.extend_from names it, the run is the one that it points to when the pipeline first reads it.",
    )
