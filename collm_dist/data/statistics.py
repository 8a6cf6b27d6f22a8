"""Plain facts about a user-item pair, as of strictly before the row: what a pair slot carries.

Every feature is a fixed formula of four counts of earlier events. Nothing is fitted and nothing standardized by the
data, so no label of the row or of a later row can be in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.context_block import ContextBlock, IntArray

# Rates are smoothed towards this rate with the weight of this many events. Half is the neutral rate; the weight is of
# the order at which a rate begins to say more than the prior does.
PRIOR_RATE, PRIOR_WEIGHT = 0.5, 5.0

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


def compute_log_odds(likes: IntArray, rows: IntArray) -> NDArray[np.float64]:
    """Return the log-odds of a smoothed like rate."""
    rate = (likes + PRIOR_WEIGHT * PRIOR_RATE) / (rows + PRIOR_WEIGHT)
    log_odds: NDArray[np.float64] = np.log(rate) - np.log1p(-rate)
    return log_odds


def compute_pair_features(block: ContextBlock) -> NDArray[np.float32]:
    """Return (N, F) features of a block's targets, in the order of ``PAIR_FEATURES``.

    The sum of the log-odds is the naive-Bayes guess: user and item taken as independent evidence.
    """
    user = compute_log_odds(block.user_likes, block.user_rows)
    item = compute_log_odds(block.item_likes, block.item_rows)
    counts = (block.user_likes, block.user_rows, block.item_likes, block.item_rows)
    columns = [user, item, user + item, *(np.log1p(count) / 4 for count in counts)]
    columns += [(block.user_rows == 0).astype(float), (block.item_rows == 0).astype(float)]
    return np.stack(columns, axis=1).astype(np.float32)
