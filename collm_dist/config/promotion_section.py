"""Settings of the decision to replace the run in use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collm_dist.config.section import Section, operational


class PromotionConfig(Section):
    """Whether a run takes the place of the one in use: decided on today's test rows, by a rule written down before."""

    min_paired_difference: float | None = operational(
        None,
        "Stage 2 less the baseline on the same test rows must be at least this, with the lower end of its "
        "interval: 0 wants proof of a gain, -0.005 accepts no proof of a loss beyond that. Default: no promotion.",
    )
    metric: str = operational("auc", "auc, uauc, ndcg@k or hr@k.", pattern=r"^(auc|uauc|(ndcg|hr)@\d+)$")
    baseline: Literal[
        "previous", "cf", "stage1", "slots_without_llm", "as_of_logistic", "bias_logistic", "popularity"
    ] = Field(
        "previous",
        description="previous: stage 2 of dataset.extend_from, scoring the same rows; or another row of the table.",
    )
    pointer: str | None = operational(
        None,
        "Symbolic link to the run in use, moved by a promotion; default: 'current' beside run.dir. As "
        "dataset.extend_from it stands for the run that it points to when the pipeline first sees it.",
    )
