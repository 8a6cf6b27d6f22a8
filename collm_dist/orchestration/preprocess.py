"""Preprocessing on Ray: raw logs to samples, shards and a manifest. The result does not depend on the workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from collm_dist.config import Config, DatasetConfig
from collm_dist.data.ingest.file_parts import PART_BYTES
from collm_dist.data.ingest.filtered_buckets import load_filtered_ids, load_item_counts
from collm_dist.data.ingest.forgotten_users import load_forgotten
from collm_dist.data.ingest.id_forms import check_extension, describe_forms, unify_items
from collm_dist.data.ingest.id_tables import (
    PreviousTables,
    assign_items,
    assign_users,
    load_previous_tables,
    write_id_tables,
)
from collm_dist.data.ingest.ingest_tasks import filter_bucket, read_chunk
from collm_dist.data.ingest.input_checks import check_filtered_rows, check_items, check_reads, check_splits
from collm_dist.data.ingest.input_facts import InputFacts, describe_input, list_warnings, merge_facts
from collm_dist.data.ingest.interaction_filters import count_unknown_items, select_ids, sum_over_months
from collm_dist.data.ingest.item_texts import ItemCatalogue
from collm_dist.data.ingest.lake_tables import LakeTable, open_tables
from collm_dist.data.ingest.source import Source, open_source
from collm_dist.data.ingest.user_texts import write_user_texts
from collm_dist.data.manifest_record import (
    PreprocessStats,
    build_manifest_record,
    drop_examples,
    format_summary,
    sum_split_rows,
)
from collm_dist.data.preprocess_plan import PreprocessPlan, resolve_counts
from collm_dist.data.samples.event_pool import draw_event_pool
from collm_dist.data.samples.sample_tasks import build_bucket, count_items, join_bucket, write_split_shard
from collm_dist.data.samples.split_cuts import build_split_rule
from collm_dist.data.samples.splits import SPLITS, build_calendar_rule
from collm_dist.data.shards.manifest import load_manifest, remove_unlisted_files
from collm_dist.data.step_fingerprints import ORDER_INPUT, compute_step_fingerprint
from collm_dist.data.table_pins import drop_pins, find_versions, list_moved, pin_tables
from collm_dist.orchestration.cluster import ByteProgress, check_nodes, connect_ray, run_tasks
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import clear_unfinished, compute_json_hash
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.run_dir import RunDir

# Each item part reads a piece of every bucket's file, so small logs get few, large parts.
ROWS_PER_ITEM_PART = 1 << 18


def run_preprocess(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the data step, unless it is done, and return its manifest.

    Args:
        config: the experiment.
        run_dir: where to write.
        force: redo the step even if it is done.

    Raises:
        DataError: the input is missing or malformed.
        ArtifactError: the step was done with other settings or inputs.
        LaunchError: Ray is missing, or its nodes do not share the run directory.
    """
    data_dir = run_dir.step_dir("data")
    if not force and is_step_current(run_dir, "data", compute_step_fingerprint(config, run_dir, "data")):
        print(f"data: done already ({data_dir})")
        _show_moved_tables(config.dataset, open_tables(pin_tables(config.dataset, run_dir)))
        return run_dir.read_record("data")
    dataset, tables = find_versions(config.dataset, run_dir, force=force)
    _show_moved_tables(config.dataset, tables)
    source = open_source(dataset)
    fingerprint = compute_step_fingerprint(config, run_dir, "data", source)
    for guess in source.list_guesses():
        print(f"data: {guess}")
    forgotten = load_forgotten(config.dataset.forget)
    extended = config.dataset.extend_from
    num_previous = len(load_manifest(Path(extended) / "data").buckets) if extended is not None else 0
    inputs = source.inputs()
    preprocessing = resolve_counts(config.preprocessing, inputs, num_previous)
    assert isinstance(preprocessing.num_user_buckets, int)  # resolved
    previous = load_previous_tables(config.dataset, preprocessing.num_user_buckets, forgotten)
    counts = preprocessing.num_user_buckets, preprocessing.num_shards
    work_dir = _open_work_dir(run_dir, compute_json_hash([fingerprint, PART_BYTES, counts])[:12])
    plan = PreprocessPlan(
        work_dir=work_dir.absolute(),
        data_dir=data_dir.absolute(),
        dataset=dataset,
        preprocessing=preprocessing,
        seed=config.run.seed,
        num_candidates=config.evaluation.num_candidates,
        stores_order=ORDER_INPUT in fingerprint,
    )
    run = partial(
        run_tasks,
        parallelism=config.cluster.preprocess_parallelism,
        progress_bar=config.monitoring.progress_bar,
        memory_remedy="raise preprocessing.num_user_buckets or lower cluster.preprocess_parallelism",
    )
    with clear_unfinished(data_dir), connect_ray(config.cluster):
        check_nodes(plan.data_dir)
        manifest = _preprocess(plan, source, inputs, previous, forgotten, run)
    summary = format_summary(manifest, config.dataset)
    manifest = drop_examples(manifest) | {"fingerprint": fingerprint}
    remove_unlisted_files(data_dir, manifest)
    run_dir.write_record("data", manifest)
    drop_pins(run_dir)
    shutil.rmtree(work_dir)
    print("\n".join([*summary, f"  {data_dir / 'manifest.json'}"]))
    return manifest


def _show_moved_tables(dataset: DatasetConfig, tables: Mapping[str, LakeTable]) -> None:
    """Print which lakehouse tables have moved on from the versions that the run keeps."""
    for line in list_moved(dataset, tables):
        print(f"data: {line}")


def _open_work_dir(run_dir: RunDir, key: str) -> Path:
    """Return the folder of intermediate files, keeping those that an interrupted run with the same key left there."""
    data_dir = run_dir.step_dir("data")
    run_dir.withdraw("data")
    work_dir = data_dir / f".work-{key}"
    for stale in data_dir.glob(".work-*"):
        if stale != work_dir:
            shutil.rmtree(stale)
    work_dir.mkdir(parents=True, exist_ok=True)
    return work_dir


@dataclass(frozen=True)
class _CheckedInput:
    """The log and the item files as a whole, with ids in their final form.

    Attributes:
        facts: of the log.
        whole_columns: columns in whose ids 17.0 is 17.
        item_file, items: the item files as they are written, and their table ``item_id, title, text``.
        catalogue: the same table; None without item files.
        item_counts: table ``id, month, count`` of the log's items.
    """

    facts: InputFacts
    whole_columns: frozenset[str]
    item_file: ItemCatalogue
    items: Any
    catalogue: Any
    item_counts: Any

    @property
    def item_ids(self) -> Any:
        """Distinct item ids of the log."""
        return self.item_counts.column("id").unique()

    @property
    def known_items(self) -> Any:
        """Ids in the item files; None without item files."""
        return None if self.catalogue is None else self.catalogue.column("item_id").combine_chunks()


def _check_input(
    plan: PreprocessPlan, source: Source, reads: list[dict[str, Any]], previous: PreviousTables
) -> _CheckedInput:
    """Read the item files, decide on the form of ids, print warnings, and check the input as a whole."""
    item_file = source.read_items()
    check_items(plan.dataset, item_file)
    facts = merge_facts(reads)
    whole = facts.settle_ids(item_file.table, {"user_id": previous.user_ids, "item_id": previous.item_ids})
    for note in describe_forms(facts.forms, whole):
        print(f"data: {note}")
    items = unify_items(item_file.table) if "item_id" in whole else item_file.table
    catalogue = items if source.items_uris else None
    counts = load_item_counts(plan, [read["uri"] for read in reads], whole)
    log = _CheckedInput(facts, whole, item_file, items, catalogue, counts)
    warnings = list_warnings(facts, plan.dataset, log.item_ids, catalogue)
    for warning in warnings:  # before the work
        print(f"data: WARNING: {warning}", flush=True)
    check_reads(plan.dataset, reads, count_unknown_items(counts, log.known_items), previous.rows, warnings)
    return log


def _preprocess(
    plan: PreprocessPlan,
    source: Source,
    inputs: dict[str, Any],
    previous: PreviousTables,
    forgotten: Any,
    run: Callable[..., list[Any]],
) -> dict[str, Any]:
    """Run the tasks in order and return the manifest's record without its fingerprint."""
    buckets = range(plan.num_buckets)
    plan_ref, source_ref, forgotten_ref = ray.put(plan), ray.put(source.for_workers()), ray.put(forgotten)

    # Read the raw files and check them as a whole. The next parts of a large file are found while others are read.
    chunks = enumerate(source.split_chunks(inputs))
    num_bytes = sum(int(inputs[uri]["size"] or 0) for uri in {chunk.uri for chunk in source.chunks})
    reads = run(
        read_chunk,
        ((plan_ref, source_ref, index, chunk, forgotten_ref) for index, chunk in chunks),
        description="reading",
        progress=ByteProgress(num_bytes, lambda arguments: arguments[3].num_bytes),
        in_order=True,
    )
    log, uris = _check_input(plan, source, reads, previous), [read["uri"] for read in reads]

    # Drop rows outside the calendar windows, and rows of users and items that the filters exclude.
    window = None
    if plan.dataset.split.method == "calendar":
        window = build_calendar_rule(plan.dataset.split, min(read["first"] for read in reads))
    kept_items = select_ids(
        sum_over_months(log.item_counts, window), plan.dataset.min_item_interactions, plan.dataset.max_item_interactions
    )
    known_ref, kept_ref = ray.put(log.known_items), ray.put(kept_items)
    first_rows = np.cumsum([0] + [read["rows_read"] for read in reads]).tolist()
    num_raw_rows, chunk_paths = first_rows.pop(), [plan.work_file("chunk", index) for index in range(len(reads))]
    filters = run(
        filter_bucket,
        [
            (plan_ref, bucket, chunk_paths, uris, first_rows, log.whole_columns, known_ref, kept_ref, window)
            for bucket in buckets
        ],
        description="filtering",
    )
    num_rows = check_filtered_rows(filters)

    # Fix the splits and the id tables, which need all buckets.
    rule = window or build_split_rule(plan)
    with show_phase("tables of users and items"):
        user_ids, used_items = ([load_filtered_ids(plan, b, kind) for b in buckets] for kind in ("users", "items"))
        check_extension(log.facts.forms["user_id"], pa.chunked_array(user_ids), previous.user_ids, "user_id")
        check_extension(log.facts.forms["item_id"], pa.chunked_array(used_items), previous.item_ids, "item_id")
        user_tables, user_ranges = assign_users(previous, user_ids)
        item_ids = assign_items(previous, used_items)
        tables = write_id_tables(plan.data_dir, user_tables, user_ranges, item_ids, log.items)
        user_texts = write_user_texts(plan.data_dir, plan.dataset, tables.user_ids, forgotten)

    # Build the samples: histories by user, as-of counts by item, joined by row id.
    items_ref, pool_ref = ray.put(pa.array(item_ids, pa.string())), ray.put(draw_event_pool(plan, item_ids))
    num_parts = min(plan.num_buckets, 1 + num_rows * (1 + plan.max_negatives_per_row) // ROWS_PER_ITEM_PART)
    samples = run(
        build_bucket,
        [(plan_ref, b, rule, user_tables[b], items_ref, pool_ref, num_raw_rows, num_parts) for b in buckets],
        description="building samples",
    )
    split_rows = sum_split_rows(samples)
    check_splits(plan.dataset, split_rows)
    run(count_items, [(plan_ref, part, num_parts) for part in range(num_parts)], description="counting item events")
    joins = run(join_bucket, [(plan_ref, bucket, num_parts) for bucket in buckets], description="joining")

    shards = run(
        write_split_shard,
        [(plan_ref, split, shard) for split in range(len(SPLITS)) for shard in range(plan.num_shards)],
        description="packing shards",
    )
    users = sum(bucket.get("users", 0) for bucket in filters), sum(bucket.get("single", 0) for bucket in filters)
    record = describe_input(log.facts, plan.dataset, log.item_ids, log.catalogue, users)
    stats = PreprocessStats(
        reads, filters, joins, shards, split_rows, log.item_file, len(forgotten), record, user_texts
    )
    return build_manifest_record(plan, source, previous, tables, stats)
