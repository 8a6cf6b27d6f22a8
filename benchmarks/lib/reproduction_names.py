"""Names of cells and models on the page of the reproduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm_dist.evaluation.report_markdown import MODEL_NAMES

VARIANT_NAMES = {
    "stage2": "the paper's two slots",
    "train_cf": "two slots, CF model trained further (T1)",
    "scratch": "two slots, CF model from scratch (T2)",
    "ui_tokens": "learned in stage 2 only",
    "item_ids": "slots of the history's items",
    "pair": "also the pair slot",
    "pair_cross_fit": "pair slot, cross-fitted",
    "pair_all": "pair slot, cross-fitted, all feedback",
    "pair_ask_first": "pair slot, the question first",
}
_OF_CELLS = ("stage2", "slots_without_llm", "slots_shuffled")
CF_NAMES = {"mf": "MF", "lightgcn": "LightGCN", "sasrec": "SASRec", "din": "DIN", "none": "id tokens"}

# Suffixes of the collaborative model, which most variants share.
_FITS = {"pair_cross_fit": ", cross-fitted", "pair_all": ", cross-fitted, all feedback"}
# Suffixes of stage 1, which most variants share.
_QUESTIONS = {"pair_ask_first": ", the question first"}


def name_model(row: Mapping[str, Any], model: str) -> str:
    """Return the name of a row's model, with its cell unless all cells share it, as they do the baselines."""
    name = MODEL_NAMES.get(model, model)
    if model == "cf":
        return f"{CF_NAMES[row['cf']]}{_FITS.get(row['variant'], '')}: {name}"
    if model == "stage1":
        return f"{name}{_QUESTIONS.get(row['variant'], '')}"
    return f"{name_cell(row)}: {name}" if model in _OF_CELLS else name


def name_cell(row: Mapping[str, Any]) -> str:
    """Return the name of a row's cell."""
    return f"{CF_NAMES[row['cf']]}, {VARIANT_NAMES[row['variant']]}"
