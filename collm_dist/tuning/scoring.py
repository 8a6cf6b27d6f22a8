"""Distributed scoring of a split: every row exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.distributed import gather_objects, get_rank, get_world_size
from collm_dist.prompt_batch import PromptBatch
from collm_dist.random_keys import hash_integers
from collm_dist.tuning.step_batches import iter_step_batches

if TYPE_CHECKING:
    from collm_dist.tuning.loaded_stage import LoadedStage


AUTO_TOKENS = {"cuda": 16384, "cpu": 2048}


def score_split(
    loaded: LoadedStage,
    order: GlobalOrder,
    max_tokens: int | Literal["auto"],
    *,
    shuffle_slots_seed: int | None = None,
    progress: str | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Score every row of an order. Collective; every rank returns all scores.

    Args:
        loaded: a stage's model.
        order: the rows, unshuffled.
        max_tokens: see ``evaluation.max_tokens_per_micro_batch``.
        shuffle_slots_seed: ablation: fill every slot from another row (see ``shuffle_slots``); None = off.
        progress: name of the progress bar of rank 0; None = no bar.

    Returns:
        (N,) row ids, sorted, and (N,) scores.
    """
    if max_tokens == "auto":
        max_tokens = AUTO_TOKENS[loaded.device.type]
    collator = loaded.scoring_collator if shuffle_slots_seed is None else loaded.collator.for_scoring(slots=False)
    share = -(-order.num_rows // get_world_size())
    with tqdm(total=share, desc=progress, unit="row", disable=progress is None or get_rank() > 0) as bar:
        return score_batches(
            loaded.model,
            collator,
            order,
            max_tokens,
            loaded.device,
            shuffle_slots_seed=shuffle_slots_seed,
            on_batch=bar.update,
        )


@torch.no_grad()
def score_batches(
    model: Any,
    collator: PromptCollator,
    order: GlobalOrder,
    max_tokens: int,
    device: torch.device,
    *,
    shuffle_slots_seed: int | None = None,
    on_batch: Callable[[int], object] = lambda _: None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Score an order with a model in evaluation mode; see ``score_split``.

    Args:
        model, device: the model and its device.
        collator: a collator for scoring.
        order, max_tokens, shuffle_slots_seed: see ``score_split``.
        on_batch: called after each micro-batch with its number of rows.
    """
    row_ids, weights, scores = [], [], []
    for step_batch in iter_step_batches(order.iter_batches(), collator, max_tokens, device):
        for batch in step_batch.micro_batches:
            if shuffle_slots_seed is not None:
                batch = shuffle_slots(batch, step_batch.block, collator, shuffle_slots_seed)
            row_ids.append(batch.row_ids)
            weights.append(batch.weights)
            scores.append(model(batch.to(device)).float())
            on_batch(int((batch.weights > 0).sum()))
    is_real = torch.cat(weights) > 0
    return _gather(torch.cat(row_ids)[is_real], torch.cat(scores).cpu()[is_real], order.num_rows)


def _gather(
    row_ids: torch.Tensor, scores: torch.Tensor, num_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    parts = gather_objects((row_ids.numpy(), scores.numpy()))
    ids, values = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    order = np.argsort(ids, kind="stable")
    assert len(ids) == num_rows, f"{len(ids)} rows scored of {num_rows}"
    return ids[order], values[order]


def shuffle_slots(batch: PromptBatch, block: ContextBlock, collator: PromptCollator, seed: int) -> PromptBatch:
    """Return the micro-batch with every slot filled from another row of the block; the text stays.

    The other row depends only on the block and the seed, not on micro-batches or ranks: rows are ordered by hash, and
    each takes the slots of its predecessor in that circle.

    Args:
        batch: a micro-batch of the block; prefixes have no slots.
        block: the global batch.
        collator: lays out the prompts.
        seed: seed of the hash.
    """
    by_hash = np.argsort(hash_integers(seed, block.row_id), kind="stable")
    previous = np.empty_like(by_hash)
    previous[by_hash] = np.roll(by_hash, 1)
    by_row = np.argsort(block.row_id, kind="stable")
    targets = by_row[np.searchsorted(block.row_id[by_row], batch.row_ids.numpy())]
    donors = torch.from_numpy(previous[targets])  # (N,) targets of the block

    rows = batch.tree_lengths.list_rows()
    first = torch.searchsorted(rows[batch.last], torch.arange(len(batch.tree_lengths)))  # each row's first target
    slots = batch.item_slots
    places = slots.places - len(batch.prefix_ids)
    slot_targets = torch.where(batch.tree_targets[places] < 0, first[rows[places]], batch.tree_targets[places])
    queries: dict[str, Any] = {
        name: torch.from_numpy(values) for name, values in collator.list_user_queries(block).items()
    }
    of_targets = len(batch.user_idx) == len(donors) and len(queries["user_idx"]) == block.num_targets
    query_donors = donors if of_targets else torch.from_numpy(block.target_contexts)[donors[first]]
    return dataclasses.replace(
        batch,
        item_slots=dataclasses.replace(slots, sources=torch.from_numpy(block.item_idx)[donors[slot_targets]]),
        item_timestamps=torch.from_numpy(block.timestamp)[donors[slot_targets]],
        pair_features=torch.from_numpy(compute_pair_features(block))[donors],
        **{name: values[query_donors] for name, values in queries.items()},
    )
