"""Validation rows and the metrics of their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.metrics import compute_auc, compute_hit_rate, compute_logloss, compute_ndcg, compute_uauc


@dataclass(frozen=True)
class ValidRows:
    """Validation rows.

    Attributes:
        order: the rows, unshuffled.
        row_id, label, user_idx: (N,) sorted by row id.
        group_id: (N,) candidate list of each row: the row id of its positive. A list is in one context, and contexts
            are sampled whole, so lists are complete.
    """

    order: GlobalOrder
    row_id: Any
    label: Any
    user_idx: Any
    group_id: Any

    def score(self, compute: Callable[[ContextBlock], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the (N,) scores of the rows by a function of their blocks, sorted by row id."""
        blocks = list(self.order.iter_batches())
        row_ids = np.concatenate([block.row_id for block in blocks])
        scores = np.concatenate([compute(block) for block in blocks])
        return scores[np.argsort(row_ids, kind="stable")]


def load_valid_rows(order: GlobalOrder) -> ValidRows:
    """Read labels, users and candidate lists of an order's rows."""
    blocks = list(order.iter_batches())
    row_id = np.concatenate([block.row_id for block in blocks])
    by_row = np.argsort(row_id, kind="stable")
    users = np.concatenate([block.user_idx[block.target_contexts] for block in blocks])
    labels, groups = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("label", "group_id"))
    return ValidRows(order, row_id[by_row], labels[by_row], users[by_row], groups[by_row])


def compute_metrics(rows: ValidRows, scores: Any, names: Iterable[str] = ()) -> dict[str, float | None]:
    """Return the metrics of the rows' (N,) scores by name; None = undefined on these rows.

    Args:
        rows: the rows.
        scores: their scores.
        names: metrics that are needed; those of candidate lists, such as ndcg@10, are computed only then.
    """
    metrics = {
        "auc": compute_auc(rows.label, scores),
        "uauc": compute_uauc(rows.label, scores, rows.user_idx)[0],
        "logloss": compute_logloss(rows.label, scores),
    }
    for name in names:
        kind, _, cutoff = name.partition("@")
        if cutoff:
            compute = {"ndcg": compute_ndcg, "hr": compute_hit_rate}[kind]
            metrics[name] = compute(rows.label, scores, rows.group_id, int(cutoff))
    return metrics
