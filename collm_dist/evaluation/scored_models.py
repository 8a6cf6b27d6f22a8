"""Scores of every model on the evaluated rows. The stages score on all processes; the rest is quick and needs one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collm_dist.cf.model_files import load_cf_model
from collm_dist.config import Config
from collm_dist.data.prompts.template import load_prompt_text
from collm_dist.data.samples.statistics import compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock, concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.local_shards import build_local_shards
from collm_dist.data.shards.manifest import Manifest
from collm_dist.evaluation.baselines import TRAIN_COLUMNS, Baseline, fit_baselines
from collm_dist.evaluation.comparison import EvaluatedRows, ScoredModel
from collm_dist.evaluation.previous_stage2 import link_previous_models, load_previous_config
from collm_dist.evaluation.ranking_baselines import fit_ranking_baselines
from collm_dist.evaluation.score_files import align_scores
from collm_dist.evaluation.slots_mlp import build_slot_inputs, find_slots, fit_slots_mlp, pad_histories
from collm_dist.metrics import FloatArray
from collm_dist.runs.previous_run import compares_with_previous, find_previous
from collm_dist.runs.run_dir import STAGES, RunDir, StageName
from collm_dist.tuning.engine import init_distributed
from collm_dist.tuning.scoring import score_split
from collm_dist.tuning.stage import get_stage, load_stage_model
from collm_dist.tuning.stage2 import load_slot_vectors

# Rows handed to the models at once; every process sees a batch whole and takes its share.
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class EvaluatedSplit:
    """The rows of one split that are evaluated: their order in the shards, their contents, their slices."""

    order: GlobalOrder
    block: ContextBlock
    rows: EvaluatedRows


@dataclass
class ModelScores:
    """What the table is made of.

    Attributes:
        models: each split's scored models, in the order of the table.
        left_out: why a model is not there, by name.
    """

    models: dict[str, list[ScoredModel]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def _is_available(config: Config, run_dir: RunDir, name: StageName) -> bool:
    return run_dir.is_done(name) and get_stage(config, name).is_enabled


def load_split(order: GlobalOrder, split: str) -> EvaluatedSplit:
    """Load all rows of an order."""
    block = concatenate_blocks(list(order.iter_batches(0)))
    return EvaluatedSplit(order, block, EvaluatedRows.from_block(split, block))


def load_splits(config: Config, run_dir: RunDir, manifest: Manifest) -> dict[str, EvaluatedSplit]:
    """Load the splits of the report, and if stage 1 is done, a sample of its training rows under the name train."""
    data_dir = run_dir.step_dir("data")
    local_shards = build_local_shards(config, data_dir)
    found: dict[str, EvaluatedSplit] = {}
    for split in dict.fromkeys(config.evaluation.splits):
        order = GlobalOrder(
            data_dir,
            manifest,
            split,
            config.run.seed,
            _BATCH_ROWS,
            max_users=config.evaluation.max_users,
            shuffle=False,
            local_shards=local_shards,
        )
        found[split] = load_split(order, split)
    most = min(config.evaluation.train_contexts, config.stage1.max_train_contexts or config.evaluation.train_contexts)
    if most == 0 or not _is_available(config, run_dir, "stage1"):
        return found
    order = GlobalOrder(
        data_dir,
        manifest,
        "train",
        config.run.seed,
        _BATCH_ROWS,
        max_contexts=most,
        shuffle=False,
        local_shards=local_shards,
    )
    found["train"] = load_split(order, "train")
    return found


def score_stages(
    config: Config, run_dir: RunDir, splits: Mapping[str, EvaluatedSplit]
) -> dict[tuple[str, str], FloatArray]:
    """Score the stages that are done, and stage 2 with shuffled slots. All processes call this together.

    Returns:
        (N,) scores by (model, split), the same on every process.
    """
    scores: dict[tuple[str, str], FloatArray] = {}
    stages = [get_stage(config, name) for name in STAGES if _is_available(config, run_dir, name)]
    if not stages and not compares_with_previous(config):
        return scores
    device = init_distributed(config.cluster.collective_timeout_minutes)
    for stage in stages:
        loaded = load_stage_model(config, run_dir, stage.name, device)
        for split, evaluated in splits.items():
            if split == "train" and stage.lora is None:
                continue
            seeds: dict[str, int | None] = {stage.name: None}
            if stage.has_slots and config.evaluation.slots_ablation:
                seeds["slots_shuffled"] = config.run.seed
            for name, seed in seeds.items():
                row_ids, found = score_split(
                    loaded,
                    evaluated.order,
                    config.evaluation.max_tokens_per_micro_batch,
                    shuffle_slots_seed=seed,
                )
                scores[name, split] = align_scores(evaluated.rows.row_id, row_ids, found, f"{name} on {split}")
        del loaded
    if compares_with_previous(config):
        scores |= _score_previous(config, run_dir, splits, device)
    return scores


def _score_previous(
    config: Config, run_dir: RunDir, splits: Mapping[str, EvaluatedSplit], device: torch.device
) -> dict[tuple[str, str], FloatArray]:
    """Score today's rows with stage 2 of the run that this one extends."""
    previous = find_previous(config)
    assert previous is not None
    old = load_previous_config(previous)
    scores: dict[tuple[str, str], FloatArray] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_stage_model(old, link_previous_models(Path(folder), run_dir, previous), "stage2", device)
        for split, evaluated in splits.items():
            if split != "train":
                row_ids, found = score_split(loaded, evaluated.order, config.evaluation.max_tokens_per_micro_batch)
                scores["previous", split] = align_scores(evaluated.rows.row_id, row_ids, found, f"previous on {split}")
    return scores


def collect_models(
    config: Config,
    run_dir: RunDir,
    manifest: Manifest,
    splits: Mapping[str, EvaluatedSplit],
    stage_scores: Mapping[tuple[str, str], FloatArray],
) -> ModelScores:
    """Score the baselines, the collaborative model and the slots without LLM; add the stages' scores.

    Args:
        config, run_dir, manifest: the run.
        splits: as of load_splits.
        stage_scores: as of score_stages.
    """
    data_dir = run_dir.step_dir("data")
    collected = ModelScores({split: [] for split in splits})
    fitted = _fit_trivial(data_dir, manifest)
    cf_model = load_cf_model(run_dir, manifest) if run_dir.is_done("cf") else None
    slots = find_slots(load_prompt_text(config.prompt.stage2))
    if cf_model is None:
        collected.left_out["cf"] = "the step 'cf' has not run"
    elif config.cf.model == "none":
        collected.left_out["cf"] = "cf.model is none"
    else:
        fitted.append(_describe_cf(cf_model, manifest))
    if cf_model is not None and run_dir.is_done("stage2"):
        cf_model = load_slot_vectors(config, run_dir, manifest)
    without_llm = _fit_slots_without_llm(config, run_dir, manifest, cf_model, slots, collected.left_out)
    for stage in STAGES:
        if not any(name == stage for name, _ in stage_scores):
            enabled = get_stage(config, stage).is_enabled
            missing = f"the step '{stage}' has not run" if enabled else f"{stage}.enabled is false"
            collected.left_out[stage] = missing
    for split, evaluated in splits.items():
        models = collected.models[split]
        if split != "train":
            models += [_score(baseline, evaluated.block) for baseline in fitted]
        if split != "train" and without_llm is not None:
            models.append(_score(without_llm, evaluated.block))
        for name in ("stage1", "stage2", "slots_shuffled", "previous"):
            if (name, split) in stage_scores:
                labels, inputs = _describe_sight(name, slots, manifest.feedback)
                models.append(ScoredModel(name, labels, inputs, stage_scores[name, split]))
    return collected


def _score(baseline: Baseline, block: ContextBlock) -> ScoredModel:
    scores = baseline.score(block)
    return ScoredModel(baseline.name, baseline.training_labels, baseline.inputs, scores, baseline.has_logits)


def _fit_trivial(data_dir: Path, manifest: Manifest) -> list[Baseline]:
    """Fit the baselines for the kind of feedback there is."""
    train = load_interactions(data_dir, [*TRAIN_COLUMNS, "sampled"], split="train")
    if manifest.feedback == "implicit":
        return fit_ranking_baselines(train, manifest.num_items)
    return fit_baselines(train, manifest.num_users, manifest.num_items)


def _describe_sight(name: str, slots: frozenset[str], feedback: str) -> tuple[str, str]:
    """Return which training labels a model was fitted to, and which inputs it reads."""
    labels = "all feedback" if feedback == "explicit" else "likes, sampled dislikes"
    if name != "stage1" and "MatchID" in slots:
        return labels, "all earlier feedback" if feedback == "explicit" else "all earlier likes"
    return labels, "ids, earlier likes" if name == "cf" else "earlier likes"


def _describe_cf(cf_model: Any, manifest: Manifest) -> Baseline:
    """Wrap the collaborative model as a scorer; it takes its logits row by row."""

    @torch.no_grad()
    def score(block: ContextBlock) -> FloatArray:
        contexts, features, parts = block.target_contexts, compute_pair_features(block), []
        histories = pad_histories(block, manifest.max_history_length)
        for first in range(0, block.num_targets, _BATCH_ROWS):
            rows = slice(first, first + _BATCH_ROWS)
            users = torch.from_numpy(block.user_idx[contexts[rows]])
            history = torch.from_numpy(histories[contexts[rows]])
            items, counted = torch.from_numpy(block.item_idx[rows]), torch.from_numpy(features[rows])
            logits = cf_model.score(users, history, items, counted)
            parts.append(logits.double().numpy())
        return np.concatenate(parts)

    # The pair slot carries what such a model counts.
    seen = frozenset({"MatchID"}) if cf_model.final.wide is not None else frozenset()
    labels, inputs = _describe_sight("cf", seen, manifest.feedback)
    return Baseline("cf", labels, inputs, score)


def _fit_slots_without_llm(
    config: Config,
    run_dir: RunDir,
    manifest: Manifest,
    cf_model: Any,
    slots: frozenset[str],
    left_out: dict[str, str],
) -> Baseline | None:
    """Fit the network on the slots of the very rows that stage 2 trained on. None, and why, where there is no way."""
    name = "slots_without_llm"
    if not config.evaluation.slots_ablation:
        left_out[name] = left_out["slots_shuffled"] = "evaluation.slots_ablation is false"
    elif not run_dir.is_done("stage2"):
        left_out[name] = left_out["slots_shuffled"] = "the step 'stage2' has not run"
    elif not slots:
        left_out[name] = "the prompt of stage 2 has no slots"
    elif cf_model is None and slots != {"MatchID"}:
        left_out[name] = "the step 'cf' has not run"
    if name in left_out:
        return None

    def build_inputs(block: ContextBlock) -> np.ndarray[Any, np.dtype[np.float32]]:
        return build_slot_inputs(block, slots, cf_model, manifest.max_history_length, config.prompt.history_length)

    stage, seed, data_dir = config.stage2, config.run.seed, run_dir.step_dir("data")
    local = build_local_shards(config, data_dir)
    steps = int(run_dir.read_record("stage2")["global_steps"])
    train_order = GlobalOrder(
        data_dir,
        manifest,
        "train",
        seed,
        stage.global_batch_size,
        max_contexts=stage.max_train_contexts,
        local_shards=local,
    )
    train = concatenate_blocks(list(islice(train_order.iter_batches(0), max(steps, 1))))
    valid_order = GlobalOrder(
        data_dir,
        manifest,
        "valid",
        seed,
        _BATCH_ROWS,
        max_contexts=stage.max_valid_contexts,
        shuffle=False,
        local_shards=local,
    )
    valid = concatenate_blocks(list(valid_order.iter_batches(0)))
    model = fit_slots_mlp((build_inputs(train), train.label), (build_inputs(valid), valid.label), seed)
    labels, inputs = _describe_sight(name, slots, manifest.feedback)
    return Baseline(name, labels, inputs, lambda block: model.score(build_inputs(block)))
