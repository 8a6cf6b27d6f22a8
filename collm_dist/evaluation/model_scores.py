"""Scores of every model of the report: baselines, CF model, slots without LLM, tuned stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.config import Config
from collm_dist.data.prompts.prompt_template import FIELDS, load_prompt_text
from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock, concatenate_blocks, pad_histories
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.local_shards import build_local_shards
from collm_dist.data.shards.manifest import Manifest
from collm_dist.evaluation.baselines import TRAIN_COLUMNS, Baseline, fit_baselines
from collm_dist.evaluation.evaluated_rows import BATCH_ROWS, EvaluatedSplit, ScoredModel
from collm_dist.evaluation.model_inputs import (
    describe_inputs,
    describe_labels,
    list_anchor_inputs,
    list_cf_inputs,
    list_field_inputs,
)
from collm_dist.evaluation.previous_stage2 import load_previous_config
from collm_dist.evaluation.ranking_baselines import fit_ranking_baselines
from collm_dist.evaluation.simple_rivals import fit_simple_rivals
from collm_dist.evaluation.slot_inputs import build_slot_inputs, list_slots
from collm_dist.evaluation.slots_mlp import fit_slots_mlp
from collm_dist.metrics import FloatArray
from collm_dist.phases import follow, show_phase
from collm_dist.runs.previous_run import find_previous
from collm_dist.runs.run_dir import STAGES, RunDir
from collm_dist.tuning.stage import get_stage
from collm_dist.tuning.stage2 import load_slot_vectors

_STAGE_MODELS = (*STAGES, "slots_shuffled", "previous")


@dataclass
class ModelScores:
    """Contents of the report's table.

    Attributes:
        models: scored models of each split, in the order of the table.
        left_out: reason for each missing model, by name.
    """

    models: dict[str, list[ScoredModel]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def collect_models(
    config: Config,
    run_dir: RunDir,
    manifest: Manifest,
    splits: Mapping[str, EvaluatedSplit],
    stage_scores: Mapping[tuple[str, str], FloatArray],
) -> ModelScores:
    """Score the baselines, the CF model and the slots without LLM, and add the scores of the stages.

    Args:
        config, run_dir, manifest: of the run.
        splits: see ``load_splits``.
        stage_scores: see ``score_stages``.
    """
    collected = ModelScores({split: [] for split in splits})
    with show_phase("eval: fitting simple scores"):
        scorers = _fit_trivial(run_dir.step_dir("data"), manifest)
    scorers += fit_simple_rivals(config, run_dir, manifest.feedback)
    vectors = load_cf_model(run_dir, manifest) if run_dir.is_done("cf") else None
    slots = list_slots(load_prompt_text(config.prompt.stage2))
    if vectors is None:
        collected.left_out["cf"] = "the step 'cf' has not run"
    elif config.cf.model == "none":
        collected.left_out["cf"] = "cf.model is none"
    else:
        scorers.append(_build_cf_scorer(config, vectors, manifest))
    if vectors is not None and run_dir.is_done("stage2"):
        vectors = load_slot_vectors(config, run_dir, manifest)
    with show_phase("eval: fitting slots without the language model"):
        without_llm = _fit_slots_without_llm(config, run_dir, manifest, vectors, slots, collected.left_out)
    if without_llm is not None:
        scorers.append(without_llm)
    for stage in STAGES:
        if not any(name == stage for name, _ in stage_scores):
            is_enabled = get_stage(config, stage).is_enabled
            reason = f"the step '{stage}' has not run" if is_enabled else f"{stage}.enabled is false"
            collected.left_out[stage] = reason
    for split, evaluated in splits.items():
        models = collected.models[split]
        if split != "train":
            shown = follow(scorers, f"eval: simple scores of {split}", "models")
            models += [_score(scorer, evaluated.block) for scorer in shown]
        for name in _STAGE_MODELS:
            if (name, split) in stage_scores:
                inputs = _describe_stage_inputs(config, name, manifest.feedback)
                labels = describe_labels(manifest.feedback)
                models.append(ScoredModel(name, labels, inputs, stage_scores[name, split]))
    return collected


def _score(scorer: Baseline, block: ContextBlock) -> ScoredModel:
    scores = scorer.score(block)
    return ScoredModel(scorer.name, scorer.training_labels, scorer.inputs, scores, scorer.has_logits)


def _fit_trivial(data_dir: Path, manifest: Manifest) -> list[Baseline]:
    """Fit the trivial baselines for the feedback of the data."""
    train = load_interactions(data_dir, [*TRAIN_COLUMNS, "sampled"], split="train")
    if manifest.feedback == "implicit":
        return fit_ranking_baselines(train, manifest.num_items)
    return fit_baselines(train, manifest.num_users, manifest.num_items)


def _describe_stage_inputs(config: Config, name: str, feedback: str) -> str:
    """Return the inputs of a tuned stage, in words; ``previous`` has settings of its own."""
    if name == "previous":
        previous = find_previous(config)
        assert previous is not None
        config = load_previous_config(previous)
    prompt = load_prompt_text(config.prompt.stage1 if name == "stage1" else config.prompt.stage2)
    shown = list_field_inputs((field for field in FIELDS if field in prompt), config.cf)
    return describe_inputs(shown | list_anchor_inputs(config.anchor.kind, config.cf), feedback)


def _build_cf_scorer(config: Config, vectors: SlotVectors, manifest: Manifest) -> Baseline:
    """Return the CF model as a scorer."""

    @torch.no_grad()
    def score(block: ContextBlock) -> FloatArray:
        contexts, features, parts = block.target_contexts, compute_pair_features(block), []
        histories = pad_histories(block, manifest.max_history_length)
        for first in range(0, block.num_targets, BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            users = torch.from_numpy(block.user_idx[contexts[rows]])
            history = torch.from_numpy(histories[contexts[rows]])
            items, statistics = torch.from_numpy(block.item_idx[rows]), torch.from_numpy(features[rows])
            parts.append(vectors.score(users, history, items, statistics).double().numpy())
        return np.concatenate(parts)

    inputs = describe_inputs(list_cf_inputs(config.cf), manifest.feedback)
    return Baseline("cf", describe_labels(manifest.feedback), inputs, score)


def _fit_slots_without_llm(
    config: Config,
    run_dir: RunDir,
    manifest: Manifest,
    vectors: SlotVectors | None,
    slots: frozenset[str],
    left_out: dict[str, str],
) -> Baseline | None:
    """Fit the MLP to the slots of the rows that stage 2 was trained on.

    Returns:
        None if that is not possible; ``left_out`` then holds the reason.
    """
    name = "slots_without_llm"
    if not config.evaluation.slots_ablation:
        left_out[name] = left_out["slots_shuffled"] = "evaluation.slots_ablation is false"
    elif not run_dir.is_done("stage2"):
        left_out[name] = left_out["slots_shuffled"] = "the step 'stage2' has not run"
    elif not slots:
        left_out[name] = "the prompt of stage 2 has no slots"
    elif vectors is None and slots != {"MatchID"}:
        left_out[name] = "the step 'cf' has not run"
    if name in left_out:
        return None

    def build_inputs(block: ContextBlock) -> NDArray[np.float32]:
        return build_slot_inputs(block, slots, vectors, manifest.max_history_length, config.prompt.history_length)

    stage, seed, data_dir = config.stage2, config.run.seed, run_dir.step_dir("data")
    local_shards = build_local_shards(config, data_dir)
    num_steps = int(run_dir.read_record("stage2")["global_steps"])
    train_order = GlobalOrder(
        data_dir,
        manifest,
        "train",
        seed,
        stage.global_batch_size,
        max_contexts=stage.max_train_contexts,
        local_shards=local_shards,
    )
    train = concatenate_blocks(list(islice(train_order.iter_batches(0), max(num_steps, 1))))
    valid_order = GlobalOrder(
        data_dir,
        manifest,
        "valid",
        seed,
        BATCH_ROWS,
        max_contexts=stage.max_valid_contexts,
        shuffle=False,
        local_shards=local_shards,
    )
    valid = concatenate_blocks(list(valid_order.iter_batches(0)))
    model = fit_slots_mlp((build_inputs(train), train.label), (build_inputs(valid), valid.label), seed)
    inputs = describe_inputs(list_field_inputs((f"<{slot}>" for slot in slots), config.cf), manifest.feedback)
    return Baseline(name, describe_labels(manifest.feedback), inputs, lambda block: model.score(build_inputs(block)))
