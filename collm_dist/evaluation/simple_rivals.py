"""Rivals that combine simple scores: text similarity, a blend of all simple scores, and the anchor of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm_dist.anchor import Anchor, fit_anchor, load_anchor
from collm_dist.config import Config
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.evaluation.baselines import Baseline, Scorer
from collm_dist.evaluation.model_inputs import Inputs, describe_inputs, describe_labels, list_anchor_inputs
from collm_dist.metrics import FloatArray
from collm_dist.runs.run_dir import STAGES, RunDir


def name_anchor(config: Config) -> str | None:
    """Return the table's row of the run's anchor: a blend is a rival in every report; None without an anchor."""
    if config.anchor.kind is None:
        return None
    return "blend" if config.anchor.kind == "blend" else "anchor"


def fit_simple_rivals(config: Config, run_dir: RunDir, feedback: str) -> list[Baseline]:
    """Return text similarity, the blend, and an anchor that is not the blend.

    Raises:
        ArtifactError: the data step is not done, or the run's anchor is damaged.
    """
    # Scoring the stages has made the anchor; without a finished stage nothing is compared with it.
    anchor = load_anchor(config, run_dir) if any(run_dir.is_done(stage) for stage in STAGES) else None
    is_blend = anchor is not None and anchor.source.kind == "blend"
    blend = anchor if anchor is not None and is_blend else fit_anchor(config, run_dir, "blend")
    labels = describe_labels(feedback)
    history = Inputs.LIKES | (Inputs.DISLIKES if config.preprocessing.max_dislikes else Inputs(0))
    of_texts = describe_inputs(history, feedback)
    of_blend = describe_inputs(list_anchor_inputs("blend", config.cf), feedback)
    rivals = [
        Baseline("text_similarity", "none", of_texts, _build_text_scorer(blend, feedback), has_logits=False),
        Baseline("blend", labels, of_blend, lambda block: blend.score(block).astype(float)),
    ]
    if anchor is not None and not is_blend:
        inputs = describe_inputs(list_anchor_inputs(anchor.source.kind, config.cf), feedback)
        rivals.append(Baseline("anchor", labels, inputs, lambda block: anchor.score(block).astype(float)))
    return rivals


def _build_text_scorer(blend: Anchor, feedback: str) -> Scorer:
    """Return a scorer: similarity to the last likes; with dislikes, the log-odds of a like among similar items."""
    texts = blend.source.texts
    assert texts is not None

    def score(block: ContextBlock) -> FloatArray:
        return texts.compute_features(block)[:, -1] if feedback == "explicit" else texts.score_last_likes(block)

    return score


def describe_proven_loss(report: Mapping[str, Any], metric: str) -> str | None:
    """Return a sentence if stage 2 is proven worse than the anchor that it started from; None otherwise.

    Args:
        report: contents of report.json, with ``anchor``.
        metric: the report's main metric, ``auc`` or ``ndcg@k``.
    """
    key = {"slice": "all", "model": "stage2", "versus": report["anchor"]}
    by_split = {row["split"]: row for row in report["differences"] if key.items() <= row.items()}
    row = by_split.get("test") or by_split.get("valid")
    high = None if row is None else row.get(f"{metric}_high")
    if row is None or high is None or high >= 0:
        return None
    interval = f"[{row[f'{metric}_low']:+.4f}, {high:+.4f}]"
    return (
        f"stage 2 is proven worse than its anchor: {metric} {row[metric]:+.4f} {interval} on {row['rows']:,} rows of "
        f"{row['split']}. Train stage 2 with a lower learning rate, or choose its checkpoint on more validation rows"
    )
