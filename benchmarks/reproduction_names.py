"""What the cells of the reproduction are called on its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIANT_NAMES = {
    "stage2": "the paper's two slots",
    "train_cf": "two slots, CF model trained on (T1)",
    "scratch": "two slots, CF model from scratch (T2)",
    "ui_tokens": "learned in stage 2 alone",
    "item_ids": "slots of the history's items",
    "pair": "also the pair slot",
    "pair_cross_fit": "pair slot, cross-fitted",
    "pair_all": "pair slot, cross-fitted, all feedback",
}
CF_NAMES = {"mf": "MF", "lightgcn": "LightGCN", "sasrec": "SASRec", "din": "DIN", "none": "id tokens"}


def name_cell(row: Mapping[str, Any]) -> str:
    """Return the name of the cell that a row is of."""
    return f"{CF_NAMES[row['cf']]}, {VARIANT_NAMES[row['variant']]}"
