"""Sentences on the differences that a report proves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from collm_dist.evaluation.report_markdown import MODEL_NAMES, format_number

Judgement = Literal["better", "worse", "open", "undefined"]
_PHRASES: dict[Judgement, str] = {
    "better": "is better than",
    "worse": "is worse than",
    "open": "cannot be told from",
    "undefined": "is not compared, for lack of an interval, with",
}
_SHARES: dict[Judgement, str] = {
    "better": "The language model adds to its anchor",
    "worse": "The language model takes away from its anchor",
    "open": "No gain or loss of the language model against its anchor can be shown",
    "undefined": "The difference between the language model and its anchor has no interval",
}


def judge(difference: Mapping[str, Any], metric: str) -> Judgement:
    """Return the judgement that the interval of a paired difference allows in a metric."""
    low, high = difference.get(f"{metric}_low"), difference.get(f"{metric}_high")
    if low is None or high is None:
        return "undefined"
    return "better" if low > 0 else "worse" if high < 0 else "open"


def list_verdicts(report: Mapping[str, Any], metric: str) -> list[str]:
    """Return a sentence in one metric for each rival of the last tuned stage, on test if it is evaluated.

    Args:
        report: contents of report.json.
        metric: such as auc or ndcg@10.
    """
    splits = list(dict.fromkeys(row["split"] for row in report["rows"] if row["split"] != "train"))
    split = "test" if "test" in splits else next(iter(splits), None)
    rows = [row for row in report["rows"] if (row["split"], row["slice"]) == (split, "all")]
    by_model = {row["model"]: row for row in rows}
    stage = next((name for name in ("stage2", "stage1") if name in by_model), None)
    if stage is None:
        return []
    verdicts: list[str] = []
    for difference in report["differences"]:
        key = (difference["split"], difference["slice"], difference["model"])
        versus = difference["versus"]
        if key != (split, "all", stage) or versus not in by_model or by_model[versus].get(metric) is None:
            continue
        judgement = judge(difference, metric)
        values = f"{by_model[stage][metric]:.4f} and {by_model[versus][metric]:.4f}"
        figures = f"{metric.upper()} on {split} {values}, difference {format_number(difference, metric, signed=True)}"
        name = MODEL_NAMES.get(versus, versus)
        if versus == report["anchor"]:
            verdicts.insert(0, f"{_SHARES[judgement]} ({name}): {figures}.")
        else:
            subject = MODEL_NAMES[stage]
            verdicts.append(f"{subject[0].upper()}{subject[1:]} {_PHRASES[judgement]} {name}: {figures}.")
    return verdicts
