"""Statistics of a user-item pair as of strictly before the row: the features of pair slots.

Every feature is a fixed formula of four counts of earlier events. Nothing is fitted to or standardized by the data, so
no feature depends on the label of the row or of a later row.

On ML-1M's released split (strictly earlier timestamps) the sum of the log-odds alone reaches test AUC/UAUC .775/.670;
a logistic regression on the same counts reaches .775/.672.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import ContextBlock, IntArray

# Rates are smoothed towards 0.5 (log-odds 0) with a prior that weighs this many events. Chosen on the training and
# validation rows of ML-1M, where weights from 5 to 10 differ by less than .002 in AUC; users get the heavier prior
# because they differ less from each other than items do.
PRIOR_RATE, USER_PRIOR_WEIGHT, ITEM_PRIOR_WEIGHT = 0.5, 10.0, 5.0

PAIR_FEATURES: tuple[str, ...] = (
    "user_log_odds",
    "item_log_odds",
    "sum_log_odds",
    "user_log_likes",
    "user_log_rows",
    "item_log_likes",
    "item_log_rows",
    "user_unknown",
    "item_unknown",
)


def compute_log_odds(likes: IntArray, rows: IntArray, prior_weight: float) -> NDArray[np.float64]:
    """Return the log-odds of the like rate, smoothed by a prior of ``prior_weight`` events; 0 without events."""
    rate = (likes + prior_weight * PRIOR_RATE) / (rows + prior_weight)
    log_odds: NDArray[np.float64] = np.log(rate) - np.log1p(-rate)
    return log_odds


def compute_pair_features(block: ContextBlock) -> NDArray[np.float32]:
    """Return (N, F) features of a block's targets, in the order of ``PAIR_FEATURES``."""
    return compute_count_features(block.user_likes, block.user_rows, block.item_likes, block.item_rows)


def compute_count_features(
    user_likes: IntArray, user_rows: IntArray, item_likes: IntArray, item_rows: IntArray
) -> NDArray[np.float32]:
    """Return (N, F) features of (N,) counts, in the order of ``PAIR_FEATURES``.

    The sum of the log-odds is the naive Bayes estimate, with user and item as independent evidence.
    """
    user = compute_log_odds(user_likes, user_rows, USER_PRIOR_WEIGHT)
    item = compute_log_odds(item_likes, item_rows, ITEM_PRIOR_WEIGHT)
    columns = [user, item, user + item]
    columns += [np.log1p(count) / 4 for count in (user_likes, user_rows, item_likes, item_rows)]
    columns += [(user_rows == 0).astype(float), (item_rows == 0).astype(float)]
    return np.stack(columns, axis=1).astype(np.float32)
