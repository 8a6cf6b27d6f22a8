"""The sentences that lead docs/results.md and its sections, from the results of benchmarks/reproduce.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collm_dist.evaluation.report_markdown import MODEL_NAMES, format_number
from collm_dist.evaluation.verdict import judge

Row = Mapping[str, Any]
# Name and main metric of each data set.
DATA_SETS = {"ml1m": ("MovieLens-1M", "auc"), "amazon_industrial": ("Amazon Industrial", "ndcg@10")}
# What their prompts hold.
PROMPTS = {
    "ml1m": "The prompts ask about a title alone, except in the variant that shows titles liked and disliked before; "
    "what a user did enters through the anchor and the slots.",
    "amazon_industrial": "The prompts show the titles of the last likes.",
}
PARTS = {
    "full": "the whole recipe",
    "titles": "titles alone as item text",
    "likes": "likes alone: the stages read no dislikes, the collaborative model as the anchor",
    "text": "text alone: no anchor, no pairwise loss, two epochs in stage 1",
    "yes_no": "scored by Yes and No, not by the title's likelihood",
    "no_anchor": "without the anchor",
    "no_anchor_no_lists": "without the anchor and the listwise loss",
    "no_anchor_yes_no": "without the anchor, scored by Yes and No",
    "no_pairs": "without the pairwise loss",
    "feedback": "with the titles liked and disliked before in the prompts",
    "no_llm_loss": "without the language model's own loss",
    "no_lists": "without the listwise loss",
    "no_cf_text": "without item texts in the collaborative model",
}
_VERDICTS = {
    "better": "is better than",
    "worse": "is worse than",
    "open": "cannot be told from",
    "undefined": "has no defined difference from",
}
# The same for readers who do not know the models.
_EFFECTS = {
    "better": "improves on",
    "worse": "is worse than",
    "open": "is not proven to improve on",
    "undefined": "cannot be compared with",
}
_RIVALS = {
    "anchor": "its anchor alone",
    "blend": "the blend of all simple scores",
    "as_of_logistic": "a logistic regression on earlier counts",
    "cf": "the collaborative model",
    "stage1": "stage 1 (text)",
    "slots_shuffled": "itself with the slots of other rows",
}


def introduce(found: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return three sentences on the results of both data sets for readers who do not know the models.

    Args:
        found: name and result of each data set and part; parts, which are ablations of a smaller size, are left out.
    """
    whole = [(name, result) for name, result in found if not result["part"]]
    sentences = [sentence for name, result in whole if (sentence := _describe_gain(name, result))]
    shares = [f"{share} on {DATA_SETS[name][0]}" for name, result in whole if (share := _describe_share(result))]
    if shares:
        sentences.append(f"The language model has seen a part of the training contexts: {'; '.join(shares)}.")
    return sentences


def _describe_gain(name: str, result: Mapping[str, Any]) -> str:
    """Return whether the language model improves on the simple score that it adds to; empty if it adds to none."""
    title, metric = DATA_SETS[name]
    run = _choose_run(result)
    by_model = {row["model"]: row for row in run.rows}
    versus = next((rival for rival in ("anchor", "blend") if rival in by_model), None)
    pair = run.find_difference(versus)
    if pair is None:
        return ""
    own, other = by_model[run.stage][metric], by_model[pair["versus"]][metric]
    gain = format_number(pair, metric, signed=True)
    measured = (
        f"of 100 pairs of a like and a dislike it puts {100 * own:.2f} in the right order, that score alone "
        f"{100 * other:.2f} (AUC, difference {gain})"
        if metric == "auc"
        else f"its lists have a quality of {own:.3f} between 0 and 1, those of that score alone {other:.3f} "
        f"({metric.upper()}, difference {gain})"
    )
    variant = "" if run.variant == "full" else f" ({PARTS[run.variant]})"
    return f"On {title}{variant}, the language model {_EFFECTS[judge(pair, metric)]} {_RIVALS[versus]}: {measured}."


def select(rows: Sequence[Row], variant: str, slices: Sequence[str] = ("all",)) -> list[Row]:
    """Return the test rows of a variant on some slices; of several seeds the first."""
    chosen = [row for row in rows if (row["variant"], row["split"]) == (variant, "test") and row["slice"] in slices]
    return [row for row in chosen if row["seed"] == chosen[0]["seed"]]


def summarize(name: str, result: Mapping[str, Any]) -> list[str]:
    """Return sentences on the last stage of the whole recipe against its anchor, its rivals and its own parts.

    The collaborative model is left out if the report's column ``inputs`` differs, since it then sees less.
    """
    metric, run = DATA_SETS[name][1], _choose_run(result)
    by_model = {row["model"]: row for row in run.rows}
    own = by_model[run.stage]
    title = f"{PARTS[run.variant][0].upper()}{PARTS[run.variant][1:]}"
    seed = f", seed {own['seed']}" if has_seeds(result) else ""
    sentences = []
    for versus, rival in _RIVALS.items():
        pair = run.find_difference(versus)
        if pair is None or (versus == "cf" and by_model[versus]["inputs"] != own["inputs"]):
            continue
        sentences.append(
            f"{title}{seed}: {MODEL_NAMES[run.stage]} ({metric.upper()} {own[metric]:.4f}) "
            f"{_VERDICTS[judge(pair, metric)]} {rival} ({by_model[versus][metric]:.4f}), "
            f"difference {format_number(pair, metric, signed=True)}."
        )
    if share := _describe_share(result):
        sentences.append(f"The language model has seen {share}.")
    return sentences


def has_seeds(result: Mapping[str, Any]) -> bool:
    """Return whether a result has cells of several seeds."""
    return len({cell["seed"] for cell in result["cells"]}) > 1


def name_data_set(name: str, result: Mapping[str, Any]) -> str:
    """Return the name of a data set, and of the part if the result is one of a part."""
    return DATA_SETS[name][0] + (f", part {result['part']}" if result["part"] else "")


@dataclass(frozen=True)
class _Run:
    """The variant that sentences speak of: its last stage, and its rows on all of test."""

    variant: str
    stage: str
    rows: list[Row]
    differences: list[Row]

    def find_difference(self, versus: str | None) -> Row | None:
        """Return the difference of the last stage from a model that has a row."""
        if versus not in {row["model"] for row in self.rows}:
            return None
        found = (row for row in self.differences if (row["model"], row["versus"]) == (self.stage, versus))
        return next(found, None)


def _choose_run(result: Mapping[str, Any]) -> _Run:
    """Return the whole recipe, or the first variant if the whole recipe has not been run."""
    variant = "full" if select(result["rows"], "full") else result["cells"][0]["variant"]
    rows = select(result["rows"], variant)
    stage = "stage2" if any(row["model"] == "stage2" for row in rows) else "stage1"
    return _Run(variant, stage, rows, select(result["differences"], variant))


def _describe_share(result: Mapping[str, Any]) -> str:
    """Return how many training contexts the stages saw if that is a part of them, else an empty string."""
    given = dict(setting.split("=", 1) for setting in result["overrides"] if not setting.endswith("=null"))
    total = result["cells"][-1]["data"]["splits"]["train"]["contexts"]
    parts = [
        f"{number:,} ({number / total:{'.1%' if number < total / 100 else '.0%'}}) in {MODEL_NAMES[stage]}"
        for stage in ("stage1", "stage2")
        if (number := int(given.get(f"{stage}.max_train_contexts", total))) < total
    ]
    return f"{' and '.join(parts)} of {total:,} contexts" if parts else ""
