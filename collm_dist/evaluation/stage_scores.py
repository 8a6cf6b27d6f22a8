"""Scores of the tuned stages on the evaluated rows, computed by all processes together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from collm_dist.anchor import prepare_anchor
from collm_dist.config import Config
from collm_dist.distributed import run_on_rank_0
from collm_dist.evaluation.evaluated_rows import EvaluatedSplit
from collm_dist.evaluation.previous_stage2 import link_previous_models, load_previous_config
from collm_dist.evaluation.score_files import align_scores
from collm_dist.metrics import FloatArray
from collm_dist.runs.previous_run import compares_with_previous, find_previous
from collm_dist.runs.run_dir import STAGES, RunDir
from collm_dist.tuning.engine import init_distributed
from collm_dist.tuning.scoring import score_split
from collm_dist.tuning.stage import get_stage, load_stage_model

# Scores by (model, split), each (N,).
StageScores = dict[tuple[str, str], FloatArray]


def score_stages(config: Config, run_dir: RunDir, splits: Mapping[str, EvaluatedSplit]) -> StageScores:
    """Score the finished stages, and stage 2 with shuffled slots. All processes call this together.

    Returns:
        (N,) scores by (model, split), equal on all processes.

    Raises:
        ArtifactError: a stage is damaged or was trained on other data, or a score is not finite.
    """
    scores: StageScores = {}
    stages = [stage for name in STAGES if run_dir.is_done(name) and (stage := get_stage(config, name)).is_enabled]
    if not stages and not compares_with_previous(config):
        return scores
    device = init_distributed(config.cluster.collective_timeout_minutes)
    # A stage that is linked from another run has its anchor there; it is made again from the same data and CF model.
    run_on_rank_0(lambda: prepare_anchor(config, run_dir))
    for stage in stages:
        loaded = load_stage_model(config, run_dir, stage.name, device)
        shuffle_seeds: dict[str, int | None] = {stage.name: None}
        if stage.has_slots and config.evaluation.slots_ablation:
            shuffle_seeds["slots_shuffled"] = config.run.seed
        for split, evaluated in splits.items():
            if split == "train" and stage.lora is None:
                continue
            for name, seed in shuffle_seeds.items():
                row_ids, logits = score_split(
                    loaded,
                    evaluated.order,
                    config.evaluation.max_tokens_per_micro_batch,
                    shuffle_slots_seed=seed,
                    progress=f"{name} on {split}" if config.monitoring.progress_bar else None,
                )
                scores[name, split] = align_scores(evaluated.rows.row_id, row_ids, logits, f"{name} on {split}")
        del loaded
    if compares_with_previous(config):
        scores |= _score_previous(config, run_dir, splits, device)
    return scores


def _score_previous(
    config: Config, run_dir: RunDir, splits: Mapping[str, EvaluatedSplit], device: torch.device
) -> StageScores:
    """Score today's rows with stage 2 of the run that this one extends."""
    previous = find_previous(config)
    assert previous is not None
    previous_config = load_previous_config(previous)
    scores: StageScores = {}
    with tempfile.TemporaryDirectory() as folder:
        links = link_previous_models(Path(folder), run_dir, previous)
        prepare_anchor(previous_config, links)
        loaded = load_stage_model(previous_config, links, "stage2", device)
        for split, evaluated in splits.items():
            if split == "train":
                continue
            row_ids, logits = score_split(
                loaded,
                evaluated.order,
                config.evaluation.max_tokens_per_micro_batch,
                progress=f"previous on {split}" if config.monitoring.progress_bar else None,
            )
            scores["previous", split] = align_scores(evaluated.rows.row_id, row_ids, logits, f"previous on {split}")
    return scores
