"""What the cells of the reproduction are called on its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm_dist.evaluation.report_markdown import MODEL_NAMES

VARIANT_NAMES = {
    "stage2": "the paper's two slots",
    "train_cf": "two slots, CF model trained on (T1)",
    "scratch": "two slots, CF model from scratch (T2)",
    "ui_tokens": "learned in stage 2 alone",
    "item_ids": "slots of the history's items",
    "pair": "also the pair slot",
    "pair_cross_fit": "pair slot, cross-fitted",
    "pair_all": "pair slot, cross-fitted, all feedback",
    "pair_ask_first": "pair slot, the question first",
}
_OF_CELLS = ("stage2", "slots_without_llm", "slots_shuffled")
CF_NAMES = {"mf": "MF", "lightgcn": "LightGCN", "sasrec": "SASRec", "din": "DIN", "none": "id tokens"}

# Of the collaborative model, which most variants share.
_FITS = {"pair_cross_fit": ", cross-fitted", "pair_all": ", cross-fitted, all feedback"}
# Of stage 1, which other variants share.
_QUESTIONS = {"pair_ask_first": ", the question first"}


def name_model(row: Mapping[str, Any], model: str) -> str:
    """Return what a row's model is called, with its cell where that matters: the trivial baselines are all cells'."""
    name = MODEL_NAMES.get(model, model)
    if model == "cf":
        return f"{CF_NAMES[row['cf']]}{_FITS.get(row['variant'], '')}: {name}"
    if model == "stage1":
        return f"{name}{_QUESTIONS.get(row['variant'], '')}"
    return f"{name_cell(row)}: {name}" if model in _OF_CELLS else name


def name_cell(row: Mapping[str, Any]) -> str:
    """Return the name of the cell that a row is of."""
    return f"{CF_NAMES[row['cf']]}, {VARIANT_NAMES[row['variant']]}"
