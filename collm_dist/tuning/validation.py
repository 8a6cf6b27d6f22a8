"""Validation rows and the metrics of their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.metrics import compute_auc, compute_logloss, compute_uauc


@dataclass(frozen=True)
class ValidRows:
    """Validation rows.

    Attributes:
        order: the rows, unshuffled.
        row_id, label, user_idx: (N,) sorted by row id.
    """

    order: GlobalOrder
    row_id: Any
    label: Any
    user_idx: Any


def load_valid_rows(order: GlobalOrder) -> ValidRows:
    """Read labels and users of an order's rows."""
    blocks = list(order.iter_batches())
    row_id = np.concatenate([block.row_id for block in blocks])
    by_row = np.argsort(row_id, kind="stable")
    users = np.concatenate([block.user_idx[block.target_contexts] for block in blocks])
    labels = np.concatenate([block.label for block in blocks])
    return ValidRows(order, row_id[by_row], labels[by_row], users[by_row])


def compute_metrics(rows: ValidRows, scores: Any) -> dict[str, float | None]:
    """Return the metrics of the rows' (N,) scores by name; None = undefined on these rows."""
    return {
        "auc": compute_auc(rows.label, scores),
        "uauc": compute_uauc(rows.label, scores, rows.user_idx)[0],
        "logloss": compute_logloss(rows.label, scores),
    }
