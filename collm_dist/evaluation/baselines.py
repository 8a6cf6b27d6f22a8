"""Trivial baselines: what any table of recommenders must beat, and on public benchmarks often does not.

Each is fitted on the training rows and knows nothing that the config could tune. On ML-1M's released split (test AUC /
UAUC): item mean .709/.682, item + user mean .732/.682, bias logistic .737/.681, as-of logistic .775/.671.

A baseline scores the targets of a ContextBlock: an as-of number of a row is what was known strictly before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]  # comes with scikit-learn
from sklearn.linear_model import LogisticRegression

from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.metrics import FloatArray

Columns = Mapping[str, NDArray[Any]]
Scorer = Callable[[ContextBlock], FloatArray]

# Strength of the prior, in rows, behind every smoothed share of likes.
SMOOTHING = 5.0
# Inverse strength of the L2 penalty on the biases.
BIAS_C = 3.0
# L-BFGS stops this close to the optimum: a looser tolerance moves UAUC in the third decimal.
TOLERANCE = 1e-8
# The logistic regressions are fitted to the latest rows when there are more, to bound time and memory.
MAX_FIT_ROWS = 5_000_000

TRAIN_COLUMNS: tuple[str, ...] = (
    "user_idx",
    "item_idx",
    "label",
    "timestamp",
    "user_likes",
    "user_rows",
    "item_likes",
    "item_rows",
)


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline.

    Attributes:
        name: as in the table.
        training_labels: what of the training rows' feedback it was fitted to.
        inputs: what it reads about a row that it scores.
        score: (N,) scores of the targets of a block, higher = more likely a like.
        has_logits: whether a score is the log-odds of a like, so that a log-loss means something.
    """

    name: str
    training_labels: str
    inputs: str
    score: Scorer
    has_logits: bool = True


def _logit(probability: FloatArray) -> FloatArray:
    return np.asarray(np.log(probability) - np.log1p(-probability))


def _compute_shares(likes: NDArray[Any], rows: NDArray[Any], prior: float) -> FloatArray:
    """Return the smoothed share of likes; always strictly between 0 and 1 for a prior that is."""
    return np.asarray((likes + SMOOTHING * prior) / (rows + SMOOTHING), dtype=np.float64)


def _compute_prior(train: Columns) -> float:
    """Return the share of likes among the training rows, kept off 0 and 1 by half a row of each."""
    return float((train["label"].sum() + 0.5) / (len(train["label"]) + 1))


def _fit_shares(train: Columns, key: str, count: int) -> FloatArray:
    """Return the smoothed share of likes of each user or item."""
    likes = np.bincount(train[key], train["label"], count)
    return _compute_shares(likes, np.bincount(train[key], minlength=count), _compute_prior(train))


def fit_item_mean(train: Columns, num_items: int) -> Scorer:
    """Score a row by its item's smoothed share of likes in training."""
    item = _fit_shares(train, "item_idx", num_items)
    return lambda block: _logit(item[block.item_idx])


def fit_item_user_mean(train: Columns, num_users: int, num_items: int) -> Scorer:
    """Score a row by the mean of its item's and its user's smoothed share of likes in training."""
    item, user = _fit_shares(train, "item_idx", num_items), _fit_shares(train, "user_idx", num_users)
    return lambda block: _logit((item[block.item_idx] + user[block.user_idx[block.target_contexts]]) / 2)


def fit_bias_logistic(train: Columns, num_users: int, num_items: int) -> Scorer:
    """Fit a logistic regression on the user's and the item's identity: one bias each, an unknown one has 0."""
    latest = _find_latest_rows(train)
    users, items = train["user_idx"][latest], train["item_idx"][latest]
    columns = np.stack([users, num_users + items], axis=1).ravel()
    offsets = np.arange(0, len(columns) + 1, 2)
    one_hot = sparse.csr_matrix((np.ones(len(columns)), columns, offsets), shape=(len(users), num_users + num_items))
    weights, intercept = _fit_logistic(one_hot, train["label"][latest], BIAS_C)
    return lambda block: np.asarray(
        intercept + weights[block.user_idx[block.target_contexts]] + weights[num_users + block.item_idx]
    )


def fit_as_of_logistic(train: Columns) -> Scorer:
    """Fit a logistic regression on six numbers known strictly before a row.

    They are log(1 + count) of the user's likes and rows and of the item's, and the log-odds of both smoothed shares of
    likes, each standardized over the training rows.
    """
    prior = _compute_prior(train)

    def compute_features(
        user_likes: NDArray[Any], user_rows: NDArray[Any], item_likes: NDArray[Any], item_rows: NDArray[Any]
    ) -> FloatArray:
        counts = [np.log1p(values) for values in (user_likes, user_rows, item_likes, item_rows)]
        shares = [_compute_shares(user_likes, user_rows, prior), _compute_shares(item_likes, item_rows, prior)]
        return np.stack([*counts, *(_logit(share) for share in shares)], axis=1)

    latest = _find_latest_rows(train)
    names = ("user_likes", "user_rows", "item_likes", "item_rows")
    features = compute_features(*(train[name][latest] for name in names))
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    weights, intercept = _fit_logistic((features - mean) / scale, train["label"][latest], 1.0)

    def score(block: ContextBlock) -> FloatArray:
        rows = compute_features(block.user_likes, block.user_rows, block.item_likes, block.item_rows)
        return np.asarray((rows - mean) / scale @ weights + intercept)

    return score


def _find_latest_rows(train: Columns) -> NDArray[np.int64]:
    """Return the positions of the latest MAX_FIT_ROWS training rows, in the order of the table."""
    timestamps = train["timestamp"]
    if len(timestamps) <= MAX_FIT_ROWS:
        return np.arange(len(timestamps))
    return np.sort(np.argsort(timestamps, kind="stable")[-MAX_FIT_ROWS:])


def _fit_logistic(features: Any, labels: NDArray[Any], c: float) -> tuple[FloatArray, float]:
    """Return weights and intercept; weights of 0 and the prior's log-odds when only one label occurs."""
    if labels.min() == labels.max():
        return np.zeros(features.shape[1]), float(_logit(np.array(_compute_prior({"label": labels}))))
    model = LogisticRegression(C=c, tol=TOLERANCE, max_iter=1000).fit(features, labels)
    return model.coef_[0], float(model.intercept_[0])


def fit_baselines(train: Columns, num_users: int, num_items: int) -> list[Baseline]:
    """Fit all baselines for labelled feedback.

    Args:
        train: the training rows' TRAIN_COLUMNS, at least one row.
        num_users, num_items: sizes of the id tables.
    """
    everything, nothing, earlier = "all feedback", "ids alone", "all earlier feedback"
    return [
        Baseline("item_mean", everything, nothing, fit_item_mean(train, num_items)),
        Baseline("item_user_mean", everything, nothing, fit_item_user_mean(train, num_users, num_items)),
        Baseline("bias_logistic", everything, nothing, fit_bias_logistic(train, num_users, num_items)),
        Baseline("as_of_logistic", everything, earlier, fit_as_of_logistic(train)),
    ]
