"""Workload of the tuning benchmarks: the same rows for all sides, sampled from an epoch in training order.

Our collator lays the prompts out once. Peers get each row as a finished list of token ids with the columns and vectors
of its slots, so tokenizing costs them nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
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
# Largest relative difference between the contexts of a batch in the sample and in the epoch.
MIX_TOLERANCE = 0.03
SAMPLE_SEED = 0


@dataclass(frozen=True)
class GivenBlocks:
    """Blocks that stand in for a ``GlobalOrder``."""

    blocks: tuple[ContextBlock, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all blocks."""
        return sum(block.num_targets for block in self.blocks)

    def iter_batches(self) -> Iterator[ContextBlock]:
        """Yield the blocks."""
        yield from self.blocks


@dataclass(frozen=True)
class Sample:
    """Global batches of an epoch.

    Attributes:
        blocks: the sampled batches.
        contexts_per_batch: their mean number of contexts.
        epoch_contexts_per_batch: the mean over all full batches of the epoch.
    """

    blocks: list[ContextBlock]
    contexts_per_batch: float
    epoch_contexts_per_batch: float


def prepare_run(config_path: Path, data: Path | None, folder: Path, overrides: list[str]) -> Config:
    """Return the config of all sides; its data and CF steps are done afterwards.

    Args:
        config_path: the config file.
        data: folder with interactions.parquet and items.parquet; None = both steps are done in ``folder``, and Ray is
            not needed.
        folder: the run directory.
        overrides: settings as ``section.key=value``.
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


def sample_batches(config: Config, phase: str, count: int) -> Sample:
    """Sample full global batches whose mix of contexts is the epoch's, in random order.

    The number of contexts in a batch decides what sharing saves, so the sample is stratified by it: the epoch's batches
    are sorted by contexts and cut into ``count`` equal parts, and one batch is drawn from each part.
    """
    data_dir = RunDir(Path(config.run.dir)).step_dir("data")
    manifest = load_manifest(data_dir)
    if phase in TRAINING:
        rows = config.stage1.global_batch_size if phase == "stage1" else config.stage2.global_batch_size
        order = GlobalOrder(data_dir, manifest, "train", config.run.seed, rows)
    else:
        order = GlobalOrder(data_dir, manifest, "valid", config.run.seed, VALIDATION_ROWS, shuffle=False)
    full = [block for block in order.iter_batches() if block.num_targets == order.global_batch_size]
    if len(full) < count:
        sys.exit(
            f"{phase}: the split has {len(full)} full batches of {order.global_batch_size} rows, --batches {count}"
        )
    chosen, mean = draw_sample([block.num_contexts for block in full], count)
    blocks = [full[place] for place in chosen]
    contexts = sum(block.num_contexts for block in blocks) / count
    if phase == "scoring_100":
        blocks = [take_candidates(block, number) for number, block in enumerate(blocks)]
    return Sample(blocks, contexts, mean)


def draw_sample(contexts: Sequence[int], count: int) -> tuple[list[int], float]:
    """Draw a stratified random sample of batches.

    Args:
        contexts: number of contexts of each batch of the epoch.
        count: size of the sample.

    Returns:
        The places of the sampled batches, and the epoch's mean number of contexts.

    Raises:
        SystemExit: no sample of 1,000 has the epoch's mean number of contexts within ``MIX_TOLERANCE``.
    """
    random, mean = np.random.default_rng(SAMPLE_SEED), float(np.mean(contexts))
    strata = np.array_split(np.argsort(contexts, kind="stable"), count)
    # The mean of whole numbers cannot come closer than half a context over the size of the sample.
    allowed = max(MIX_TOLERANCE * mean, 0.5 / count)
    for _ in range(1000):
        places = [int(random.choice(stratum)) for stratum in strata]
        if abs(np.mean([contexts[place] for place in places]) - mean) <= allowed:
            return [places[number] for number in random.permutation(count)], mean
    sys.exit(f"no sample of {count} batches has the epoch's {mean:.2f} contexts a batch: raise --batches")


def take_targets(blocks: list[ContextBlock], targets_per_context: int) -> ContextBlock:
    """Return as many rows as the first block has, in contexts whose first target is repeated."""
    pool, rows = concatenate_blocks(blocks), blocks[0].num_targets
    firsts = pool.target_offsets[: -(-rows // targets_per_context)]
    return pool.take_targets(np.repeat(firsts, targets_per_context)[:rows])


def take_candidates(block: ContextBlock, seed: int) -> ContextBlock:
    """Return one context of a block with a hundred targets, distinct if the block has that many items."""
    repeated = block.take_targets(np.zeros(NUM_CANDIDATES, dtype=np.int64))
    items = np.unique(block.item_idx)
    drawn = np.random.default_rng(seed).choice(items, NUM_CANDIDATES, replace=len(items) < NUM_CANDIDATES)
    changed = {"item_idx": drawn, "row_id": np.arange(NUM_CANDIDATES)}
    return ContextBlock(**{**vars(repeated), **changed})


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
            vectors_by_kind = {
                "user": (batch.user_slots, vectors.user_vectors(*user_inputs)[batch.user_slots.sources]),
                "item": (batch.item_slots, vectors.item_vectors(batch.item_slots.sources, batch.item_timestamps)),
                "pair": (batch.pair_slots, batch.pair_features[batch.pair_slots.sources]),
            }
            for kind, (places, values) in vectors_by_kind.items():
                slots += [
                    (len(batch.header_ids) + place, kind, value)
                    for place, value in zip(places.places.tolist(), values.tolist(), strict=True)
                ]
        rows.append({"ids": ids, "label": int(block.label[target]), "slots": slots})
    return rows


def write_rows(path: Path, batches: list[list[dict[str, Any]]], answer_ids: tuple[int, int]) -> None:
    """Write the batches for the peers."""
    path.write_text(json.dumps({"batches": batches, "answer_ids": list(answer_ids)}), encoding="utf-8")


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that a large matmul reaches, for estimates."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
