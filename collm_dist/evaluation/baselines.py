"""Trivial baselines, which published recommenders often fail to beat.

Each is fitted to the training rows and has no settings. On ML-1M's released split (test AUC / UAUC): item mean
.709/.682, item + user mean .732/.682, bias logistic .737/.681, as-of logistic .775/.671.

A baseline scores the targets of a ContextBlock. As-of counts of a row are those known strictly before it.
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

# Weight, in rows, of the prior in every smoothed share of likes.
SMOOTHING = 5.0
# Inverse strength of the L2 penalty on the biases (``C`` of LogisticRegression).
BIAS_C = 3.0
# Of L-BFGS; a looser tolerance changes the third decimal of UAUC.
TOLERANCE = 1e-8
# The logistic regressions are fitted to at most this many rows, the latest, to bound time and memory.
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
        name: key in the report.
        training_labels: feedback of the training rows that it was fitted to, in words.
        inputs: inputs that it reads for each row that it scores, in words.
        score: returns (N,) scores of the targets of a block, higher = more likely a like.
        has_logits: whether scores are log-odds, so that their log-loss is meaningful.
    """

    name: str
    training_labels: str
    inputs: str
    score: Scorer
    has_logits: bool = True


def _logit(probability: FloatArray) -> FloatArray:
    return np.asarray(np.log(probability) - np.log1p(-probability))


def _compute_shares(likes: NDArray[Any], rows: NDArray[Any], prior: float) -> FloatArray:
    """Return the smoothed share of likes, strictly between 0 and 1."""
    return np.asarray((likes + SMOOTHING * prior) / (rows + SMOOTHING), dtype=np.float64)


def _compute_prior(train: Columns) -> float:
    """Return the share of likes among the training rows, with half a row of each label added to avoid 0 and 1."""
    return float((train["label"].sum() + 0.5) / (len(train["label"]) + 1))


def _fit_shares(train: Columns, key: str, count: int) -> FloatArray:
    """Return the smoothed share of likes of each user or item."""
    likes = np.bincount(train[key], train["label"], count)
    return _compute_shares(likes, np.bincount(train[key], minlength=count), _compute_prior(train))


def fit_item_mean(train: Columns, num_items: int) -> Scorer:
    """Return a scorer: the smoothed share of likes of the item in training."""
    item = _fit_shares(train, "item_idx", num_items)
    return lambda block: _logit(item[block.item_idx])


def fit_item_user_mean(train: Columns, num_users: int, num_items: int) -> Scorer:
    """Return a scorer: the mean of the item's and the user's smoothed share of likes in training."""
    item, user = _fit_shares(train, "item_idx", num_items), _fit_shares(train, "user_idx", num_users)
    return lambda block: _logit((item[block.item_idx] + user[block.user_idx[block.target_contexts]]) / 2)


def fit_bias_logistic(train: Columns, num_users: int, num_items: int) -> Scorer:
    """Fit a logistic regression on user and item identity: one bias each, 0 for unknown users and items."""
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
    """Fit a logistic regression on six as-of features.

    They are log(1 + count) of likes and rows of user and item, and the log-odds of both smoothed shares of likes, each
    standardized over the training rows.
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
    """Return the positions of the latest MAX_FIT_ROWS training rows, ascending."""
    timestamps = train["timestamp"]
    if len(timestamps) <= MAX_FIT_ROWS:
        return np.arange(len(timestamps))
    return np.sort(np.argsort(timestamps, kind="stable")[-MAX_FIT_ROWS:])


def _fit_logistic(features: Any, labels: NDArray[Any], c: float) -> tuple[FloatArray, float]:
    """Return weights and intercept; zero weights and the prior's log-odds if only one label occurs."""
    if labels.min() == labels.max():
        return np.zeros(features.shape[1]), float(_logit(np.array(_compute_prior({"label": labels}))))
    model = LogisticRegression(C=c, tol=TOLERANCE, max_iter=1000).fit(features, labels)
    return model.coef_[0], float(model.intercept_[0])


def fit_baselines(train: Columns, num_users: int, num_items: int) -> list[Baseline]:
    """Fit all baselines for explicit feedback.

    Args:
        train: TRAIN_COLUMNS of the training rows, at least one row.
        num_users, num_items: sizes of the id tables.
    """
    everything, nothing, earlier = "all feedback", "ids alone", "all earlier feedback"
    return [
        Baseline("item_mean", everything, nothing, fit_item_mean(train, num_items)),
        Baseline("item_user_mean", everything, nothing, fit_item_user_mean(train, num_users, num_items)),
        Baseline("bias_logistic", everything, nothing, fit_bias_logistic(train, num_users, num_items)),
        Baseline("as_of_logistic", everything, earlier, fit_as_of_logistic(train)),
    ]
