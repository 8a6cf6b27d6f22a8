"""Evaluated rows of each split, and the scores that a model gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collm_dist.config import Config
from collm_dist.data.shards.context_block import ContextBlock, IntArray, concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.local_shards import build_local_shards
from collm_dist.data.shards.manifest import Manifest
from collm_dist.metrics import FloatArray
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.stage import get_stage

# Targets in a batch of an evaluation order; every process reads the whole batch and scores its share.
BATCH_ROWS = 1024


@dataclass(frozen=True)
class EvaluatedRows:
    """The N evaluated rows of one split, in the order of the scores.

    Attributes:
        split: name of the split.
        row_id, user_idx, item_idx, label, sampled: (N,) as in a ContextBlock.
        group_id: (N,) candidate list of each row.
        slices: (N,) masks by name: all; warm = user and item occur in training rows; cold_user and cold_item = they do
            not. All candidates of a list are in the slice of the positive that they were drawn for.
    """

    split: str
    row_id: IntArray
    user_idx: IntArray
    item_idx: IntArray
    label: IntArray
    sampled: IntArray
    group_id: IntArray
    slices: dict[str, NDArray[np.bool_]]

    @classmethod
    def from_block(cls, split: str, block: ContextBlock) -> EvaluatedRows:
        """Return the rows of a block, in its order."""
        by_id = np.argsort(block.row_id)
        place = np.minimum(np.searchsorted(block.row_id, block.group_id, sorter=by_id), len(by_id) - 1)
        positive = by_id[place] if len(by_id) else by_id
        user_known, item_known = block.user_in_train[positive] == 1, block.item_in_train[positive] == 1
        slices = {
            "all": np.ones(block.num_targets, dtype=bool),
            "warm": user_known & item_known,
            "cold_user": ~user_known,
            "cold_item": ~item_known,
        }
        users = block.user_idx[block.target_contexts]
        return cls(split, block.row_id, users, block.item_idx, block.label, block.sampled, block.group_id, slices)


@dataclass(frozen=True)
class EvaluatedSplit:
    """One split to evaluate: its order in the shards, its contents, and its rows as the report sees them."""

    order: GlobalOrder
    block: ContextBlock
    rows: EvaluatedRows


@dataclass(frozen=True)
class ScoredModel:
    """A model's scores of the evaluated rows.

    Attributes:
        name: key of the model in the report.
        training_labels: feedback of the training rows that the model was fitted to, in words.
        inputs: inputs that the model reads for each row that it scores, in words.
        scores: (N,), higher = more likely a like.
        has_logits: whether the scores are log-odds, so that their log-loss is meaningful.
    """

    name: str
    training_labels: str
    inputs: str
    scores: FloatArray
    has_logits: bool = True


def load_splits(config: Config, run_dir: RunDir, manifest: Manifest) -> dict[str, EvaluatedSplit]:
    """Load the splits of the report, and, once stage 1 has seen all training rows, a sample of them as ``train``."""
    data_dir = run_dir.step_dir("data")
    local_shards = build_local_shards(config, data_dir)

    def load(split: str, *, max_users: int | None = None, max_contexts: int | None = None) -> EvaluatedSplit:
        order = GlobalOrder(
            data_dir,
            manifest,
            split,
            config.run.seed,
            BATCH_ROWS,
            max_users=max_users,
            max_contexts=max_contexts,
            shuffle=False,
            local_shards=local_shards,
        )
        block = concatenate_blocks(list(order.iter_batches(0)))
        return EvaluatedSplit(order, block, EvaluatedRows.from_block(split, block))

    evaluation = config.evaluation
    splits: dict[str, EvaluatedSplit] = {}
    for split in dict.fromkeys(evaluation.splits):
        splits[split] = load(split, max_users=evaluation.max_users, max_contexts=evaluation.max_contexts)
    train_contexts = min(evaluation.train_contexts, config.stage1.max_train_contexts or evaluation.train_contexts)
    if train_contexts and get_stage(config, "stage1").is_enabled and _has_seen_an_epoch(config, run_dir):
        splits["train"] = load("train", max_contexts=train_contexts)
    return splits


def _has_seen_an_epoch(config: Config, run_dir: RunDir) -> bool:
    """Return whether the weights of stage 1 have seen every training row of this run."""
    if not run_dir.is_done("stage1"):
        return False
    record = run_dir.read_record("stage1")
    seen: int = record["best_valid"]["step"] * config.stage1.global_batch_size
    return record.get("taken_from") is None and seen >= record["train_rows"]
