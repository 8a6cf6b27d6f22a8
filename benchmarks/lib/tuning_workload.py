"""What benchmarks/throughput.py and memory.py measure: the same rows for all sides, in the order of training.

Prompts are laid out once, by our collator. The peers get each row as a finished list of token ids with the places and
vectors of its slots, so tokenizing costs them nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.shards.context_block import ContextBlock, concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.loaded_stage import LoadedStage

PHASES = ("stage1", "stage2", "stage2_cached", "validation", "scoring_100")
TRAINING = ("stage1", "stage2", "stage2_cached")
VALIDATION_ROWS, NUM_CANDIDATES = 128, 100


@dataclass(frozen=True)
class GivenBlocks:
    """Blocks in the place of a ``GlobalOrder``."""

    blocks: tuple[ContextBlock, ...]

    @property
    def num_rows(self) -> int:
        """Of all blocks."""
        return sum(block.num_targets for block in self.blocks)

    def iter_batches(self) -> Iterator[ContextBlock]:
        """Yield them."""
        yield from self.blocks


def prepare_run(config_path: Path, data: Path | None, folder: Path, overrides: list[str]) -> Config:
    """Return the configuration that all sides use, with its data and CF steps done.

    Args:
        config_path: of the configuration.
        data: folder of the data; None: ``folder`` is a run whose two steps are done, and Ray is not needed.
        folder: of the run.
        overrides: settings.
    """
    settings = [
        f"run.dir={folder.resolve()}",
        "stage1.enabled=false",  # stage 2 then reads the same backbone, of the same size
        "monitoring.progress_bar=false",
        "monitoring.tensorboard=false",
        *overrides,
    ]
    if data is None:
        return load_config(config_path, settings)
    from collm_dist.orchestration.cluster import connect_ray
    from collm_dist.orchestration.preprocess import run_preprocess
    from collm_dist.orchestration.pretrain import run_pretrain

    files = {"path": data / "interactions.parquet", "items_path": data / "items.parquet"}
    settings += [f"dataset.{name}={file.resolve()}" for name, file in files.items()]
    config = load_config(config_path, settings)
    with connect_ray(config.cluster):
        run_preprocess(config, RunDir(folder))
        run_pretrain(config, RunDir(folder))
    return config


def choose_blocks(config: Config, phase: str, count: int) -> list[ContextBlock]:
    """Return global batches that stand for a whole epoch.

    Ordered by how many contexts their rows have, which decides what sharing saves, and taken at even distances.
    A phase's name that ends with ``_targets_N`` gives N targets to each context.
    """
    data_dir = RunDir(Path(config.run.dir)).step_dir("data")
    manifest = load_manifest(data_dir)
    phase, _, targets = phase.partition("_targets_")
    if phase in TRAINING:
        rows = config.stage1.global_batch_size if phase == "stage1" else config.stage2.global_batch_size
        order = GlobalOrder(data_dir, manifest, "train", config.run.seed, rows)
    else:
        order = GlobalOrder(data_dir, manifest, "valid", config.run.seed, VALIDATION_ROWS, shuffle=False)
    whole = [block for block in order.iter_batches() if block.num_targets == order.global_batch_size]
    blocks = sorted(whole, key=lambda block: block.num_contexts)
    places = [(2 * number + 1) * len(blocks) // (2 * count) for number in range(count)]
    if targets:
        return [_take_targets(blocks[place : place + 4], int(targets)) for place in places]
    chosen = [blocks[place] for place in places]
    return [_take_candidates(one, number) for number, one in enumerate(chosen)] if phase == "scoring_100" else chosen


def _take_targets(blocks: list[ContextBlock], count: int) -> ContextBlock:
    """Return as many rows as one of the blocks has, in contexts of ``count`` targets: each one's first, repeated."""
    pool, rows = concatenate_blocks(blocks), blocks[0].num_targets
    return pool.take_targets(np.repeat(pool.target_offsets[: -(-rows // count)], count)[:rows])


def _take_candidates(block: ContextBlock, seed: int) -> ContextBlock:
    """Return one context with a hundred targets, distinct where there are as many."""
    many = block.take_targets(np.zeros(NUM_CANDIDATES, dtype=np.int64))
    items = np.unique(block.item_idx)
    drawn = np.random.default_rng(seed).choice(items, NUM_CANDIDATES, replace=len(items) < NUM_CANDIDATES)
    changed = {"item_idx": drawn, "row_id": np.arange(NUM_CANDIDATES)}
    return ContextBlock(**{**vars(many), **changed})


def spell_rows(loaded: LoadedStage, block: ContextBlock) -> list[dict[str, Any]]:
    """Return each target as a plain row: ``ids``, ``label``, and ``slots`` as (column, kind, vector)."""
    collator, vectors = loaded.collator, loaded.model.cf_model
    rows = []
    for target in range(block.num_targets):
        batch = collator.collate(block.take_targets(np.array([target])), block)
        ids = torch.cat([batch.header_ids, batch.prefix_ids, batch.tree_ids]).tolist()
        slots: list[Any] = []
        if vectors is not None:
            user_inputs = batch.user_idx, batch.user_history, batch.user_target, batch.user_timestamps
            found = {
                "user": (batch.user_slots, vectors.user_vectors(*user_inputs)[batch.user_slots.sources]),
                "item": (batch.item_slots, vectors.item_vectors(batch.item_slots.sources, batch.item_timestamps)),
                "pair": (batch.pair_slots, batch.pair_features[batch.pair_slots.sources]),
            }
            for kind, (places, values) in found.items():
                slots += [
                    (len(batch.header_ids) + place, kind, value)
                    for place, value in zip(places.places.tolist(), values.tolist(), strict=True)
                ]
        rows.append({"ids": ids, "label": int(block.label[target]), "slots": slots})
    return rows


def write_rows(path: Path, batches: list[list[dict[str, Any]]], answer_ids: tuple[int, int]) -> None:
    """Write the batches for the peers."""
    path.write_text(json.dumps({"batches": batches, "answer_ids": list(answer_ids)}), encoding="utf-8")


def measure_matrix_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Return the most operations per second that a large matrix product reaches."""
    # A GPU needs large ones, several without a wait between them.
    size, products = (8192, 5) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(products):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / products)
    return 2 * size**3 / best
