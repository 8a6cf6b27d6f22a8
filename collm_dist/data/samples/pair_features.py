"""Plain facts about a user-item pair, as of strictly before the row: what a pair slot carries.

Every feature is a fixed formula of four counts of earlier events. Nothing is fitted and nothing standardized by the
data, so no label of the row or of a later row can be in it.

On ML-1M's released split (strictly earlier timestamps) the sum of the log-odds alone has test AUC / UAUC .775/.670,
where a logistic regression on the same counts has .775/.672.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import ContextBlock, IntArray

# Rates are smoothed towards one half, the neutral rate (log-odds 0), with the weight of this many events. Chosen on
# ML-1M's training and validation rows, where weights from 5 to 10 differ by less than .002 in AUC; a user's rate needs
# the heavier prior, since users differ less from each other than items do.
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
    """Return the log-odds of a like rate that is smoothed with the weight of so many events; 0 without any."""
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

    The sum of the log-odds is the naive-Bayes guess: user and item taken as independent evidence.
    """
    user = compute_log_odds(user_likes, user_rows, USER_PRIOR_WEIGHT)
    item = compute_log_odds(item_likes, item_rows, ITEM_PRIOR_WEIGHT)
    columns = [user, item, user + item]
    columns += [np.log1p(count) / 4 for count in (user_likes, user_rows, item_likes, item_rows)]
    columns += [(user_rows == 0).astype(float), (item_rows == 0).astype(float)]
    return np.stack(columns, axis=1).astype(np.float32)
