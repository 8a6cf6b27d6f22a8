"""Settings of the anchored score."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from collm_dist.config.section import Section, optional

# Chosen on validation rows of three data sets (docs/recipes.md).
RECENT_SHARE = 0.5


class AnchorConfig(Section):
    """The anchored score: a simple frozen score, to which the language model adds.

    score = anchor + gain * LLM + bias; gain and bias start at 0, so training starts at the ranking of the anchor.
    """

    kind: Annotated[
        Literal["cf", "as_of", "blend"] | None, BeforeValidator(lambda value: None if value == "none" else value)
    ] = optional(
        "none: the language model scores alone (the paper's way). cf: the CF model's logit. as_of: how "
        "often user and item occurred and were liked before the row. blend: both, with co-occurrence of items and "
        "similarity of their texts. The scores are combined by a logistic regression, fitted by time folds, so the "
        "anchor of a training row has not seen its label or a later one. It reads events of seconds before the row's, "
        "and with preprocessing.ties order also the user's likes of the same second that stand earlier in the file. cf "
        "and blend read the CF model and need cf.cross_fit.",
    )
    recent_share: float | None = optional(
        "Fit each regression to the newest time folds before its fold that hold about this share of the training rows "
        "or more. Counts grow with the log, and early on nearly every item is new; so weights fitted to all rows "
        "distrust new items. 1: to all rows before the fold. Default: 0.5.",
        gt=0,
        le=1,
    )
