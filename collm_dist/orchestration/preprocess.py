"""Preprocessing on Ray: raw logs to samples, shards and a manifest. Workers never change the result."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from collm_dist.config import Config
from collm_dist.data.ingest import ingest_tasks
from collm_dist.data.ingest.checks import check_reads, check_splits
from collm_dist.data.ingest.filters import select_ids, sum_item_counts, sum_over_months
from collm_dist.data.ingest.forgetting import find_tombstones, load_forgotten
from collm_dist.data.ingest.id_tables import (
    PreviousTables,
    assign_users,
    compute_ids_hash,
    describe_previous,
    load_previous_tables,
    sort_naturally,
    write_item_table,
    write_user_table,
)
from collm_dist.data.ingest.partition import read_table
from collm_dist.data.ingest.plan import Plan
from collm_dist.data.ingest.source import Source, open_source
from collm_dist.data.samples import sample_tasks
from collm_dist.data.samples.negatives import EventPool
from collm_dist.data.samples.splits import (
    SPLITS,
    SplitRule,
    build_amazon_book_rule,
    build_calendar_rule,
    build_ratio_rule,
    get_amazon_book_window,
)
from collm_dist.data.shards.manifest import FORMAT_VERSION, compute_content_hash
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import DataError
from collm_dist.orchestration.cluster import check_nodes, connect_ray, run_tasks
from collm_dist.random_keys import hash_integers
from collm_dist.runs.atomic_files import compute_file_hash, compute_json_hash, write_json
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.run_dir import RunDir

POOL_SIZE = 1 << 18
# Item parts are few and large where buckets are small: every part is a read of every bucket's file.
ROWS_PER_ITEM_PART = 1 << 18
DAY = 86_400

Runner = Callable[[str, Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]


def run_preprocess(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the data step, unless it is done, and return its manifest.

    Args:
        config: the experiment.
        run_dir: where to write.
        force: redo it even if it is done.

    Raises:
        DataError: the input is missing or not what it should be.
        ArtifactError: the step was done with other settings or inputs.
        LaunchError: Ray is missing, or its nodes do not share the run directory.
    """
    source = open_source(config.dataset)
    fingerprint = compute_step_fingerprint(config, run_dir, "data")
    data_dir = run_dir.step_dir("data")
    if not force and is_step_current(run_dir, "data", fingerprint):
        print(f"data: done already ({data_dir})")
        return run_dir.read_record("data")
    forgotten = load_forgotten(config.dataset.forget)
    previous = load_previous_tables(config.dataset, config.preprocessing.num_user_buckets, forgotten)
    work = _open_work_folder(run_dir, compute_json_hash(fingerprint)[:12])
    plan = Plan(
        work=work.absolute(),
        data_dir=data_dir.absolute(),
        dataset=config.dataset,
        preprocessing=config.preprocessing,
        seed=config.run.seed,
        num_candidates=config.evaluation.num_candidates,
    )
    with connect_ray(config.cluster):
        check_nodes(plan.data_dir)

        def run(description: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
            return run_tasks(
                function,
                arguments,
                description=description,
                parallelism=config.cluster.preprocess_parallelism,
                progress_bar=config.monitoring.progress_bar,
            )

        manifest = _preprocess(plan, source, previous, forgotten, run)
    manifest["fingerprint"] = fingerprint
    _remove_others(data_dir, manifest)
    write_json(run_dir.record_path("data"), manifest)
    shutil.rmtree(work)
    _print_summary(manifest, data_dir)
    return manifest


def _open_work_folder(run_dir: RunDir, key: str) -> Path:
    """Return the folder of intermediate files; what an interrupted run of the same work left there is used."""
    data_dir = run_dir.step_dir("data")
    run_dir.withdraw("data")
    work = data_dir / f".work-{key}"
    for stale in data_dir.glob(".work-*"):
        if stale != work:
            shutil.rmtree(stale)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _remove_others(data_dir: Path, manifest: dict[str, Any]) -> None:
    """Remove what an earlier run with other counts, or a killed task, left beside the files of this one."""
    ours = {data_dir / one["path"] for one in [*manifest["shards"], *manifest["buckets"]]}
    for folder in ("interactions", "shards"):
        for path in (data_dir / folder).iterdir():
            if path not in ours:
                path.unlink()


def _preprocess(plan: Plan, source: Source, previous: PreviousTables, forgotten: Any, run: Runner) -> dict[str, Any]:
    plan_ref, source_ref, buckets = ray.put(plan), ray.put(source), range(plan.num_buckets)
    chunks, users_ref = list(enumerate(source.chunks)), ray.put(forgotten)
    reads = run(
        "reading",
        ingest_tasks.read_chunk,
        [(plan_ref, source_ref, index, chunk, users_ref) for index, chunk in chunks],
    )
    items, mended = source.read_items()
    known = items.column("item_id").combine_chunks() if source.items_uris else None
    counts = sum_item_counts([read_table(plan.work / f"items-{index:05d}.arrow") for index, _ in chunks])
    unknown = _find_unknown(counts, known)
    check_reads(plan.dataset, reads, unknown, previous.rows)

    window = None
    if plan.dataset.split.method == "calendar":
        window = build_calendar_rule(plan.dataset.split, min(read["first"] for read in reads))
    low, high = plan.dataset.min_item_interactions, plan.dataset.max_item_interactions
    kept_ref, known_ref = ray.put(select_ids(sum_over_months(counts, window), low, high)), ray.put(known)
    bases = np.cumsum([0] + [read["rows_read"] for read in reads])
    paths = [plan.work / f"chunk-{index:05d}.arrow" for index, _ in chunks]
    filtered = run(
        "filtering",
        ingest_tasks.filter_bucket,
        [(plan_ref, bucket, paths, bases[:-1].tolist(), known_ref, kept_ref, window) for bucket in buckets],
    )
    num_kept = sum(one["rows"] for one in filtered)
    if num_kept == 0:
        raise DataError("dataset: no interaction is left after filters and split windows; loosen dataset.min_*, "
                        "dataset.max_* or dataset.split")  # fmt: skip
    rule = window or _build_rule(plan)

    user_tables, user_ranges = assign_users(previous, [_load_ids(plan, bucket, "users") for bucket in buckets])
    # Nearly every bucket has nearly every item: they are made distinct before Python sees them.
    found = pa.chunked_array([_load_ids(plan, bucket, "items") for bucket in buckets], pa.string()).unique()
    item_ids = [*previous.item_ids, *sort_naturally(list(set(found.to_pylist()).difference(previous.item_ids)))]
    user_ids = write_user_table(plan.data_dir / "users.parquet", user_tables)
    without_text, texts_hash = write_item_table(plan.data_dir / "items.parquet", item_ids, items)
    items_ref, pool_ref = ray.put(pa.array(item_ids, pa.string())), ray.put(_draw_pool(plan, item_ids))
    parts = min(plan.num_buckets, 1 + num_kept * (1 + plan.draws_per_row) // ROWS_PER_ITEM_PART)
    built = run(
        "building samples",
        sample_tasks.build_bucket,
        [(plan_ref, b, rule, user_tables[b], items_ref, pool_ref, int(bases[-1]), parts) for b in buckets],
    )
    split_rows = {name: Counter[str]() for name in SPLITS}
    for one in built:
        for name, rows in one["splits"].items():
            split_rows[name].update(rows)
    check_splits(plan.dataset, split_rows)
    run("counting item events", sample_tasks.count_items, [(plan_ref, part, parts) for part in range(parts)])
    joined = run("joining", sample_tasks.join_bucket, [(plan_ref, bucket, parts) for bucket in buckets])
    shards = run(
        "packing shards",
        sample_tasks.write_split_shard,
        [(plan_ref, split, shard) for split in range(len(SPLITS)) for shard in range(plan.preprocessing.num_shards)],
    )
    dropped = Counter[str]({"outside the split windows": sum(read["outside"] for read in reads),
                            "forgotten users": sum(read["forgotten"] for read in reads)})  # fmt: skip
    for causes in [read["bad"] for read in reads] + [one["dropped"] for one in filtered]:
        dropped.update(causes)
    return _describe(plan, user_ids, item_ids, texts_hash, split_rows, shards, joined, user_ranges) | {
        "extends": describe_previous(plan.dataset.extend_from).get("dataset.extend_from"),
        "dropped": {cause: count for cause, count in sorted(dropped.items()) if count},
        **_describe_forgotten(plan, source, reads, len(forgotten), previous),
        "items_without_text": without_text,
        "items_mended": dict(sorted(mended.items())),
        "tables": {name: compute_file_hash(plan.data_dir / name) for name in ("users.parquet", "items.parquet")},
        "input": {"rows": int(bases[-1]), "bad_examples": [line for read in reads for line in read["examples"]][:5]},
    }


def _find_unknown(counts: Any, known: Any) -> dict[str, int]:
    """Return the rows of each item that the item file does not have."""
    if known is None:
        return {}
    missing = sum_over_months(counts.filter(pc.invert(pc.is_in(counts.column("id"), known))), None)
    return dict(zip(missing.column("id").to_pylist(), missing.column("count").to_pylist(), strict=True))


def _build_rule(plan: Plan) -> SplitRule | None:
    """Return where the splits meet, from what the filters have left; None for a ready column."""
    method = plan.dataset.split.method
    if method == "column":
        return None
    if method == "amazon_book":
        december = pc.field("timestamp") >= get_amazon_book_window()[1]
        parts = [
            _load_bucket(plan, bucket, ["timestamp", "row"]).filter(december) for bucket in range(plan.num_buckets)
        ]
        table = pa.concat_tables(parts)
        return build_amazon_book_rule(table.column("timestamp").to_numpy(), table.column("row").to_numpy())
    # A log may have as many distinct seconds as rows: days are counted first, then the seconds of the days of the cuts.
    rule = build_ratio_rule(plan.dataset.split, *_count_times(plan, []))
    return build_ratio_rule(plan.dataset.split, *_count_times(plan, [time // DAY for time, _ in rule.starts]))


def _count_times(plan: Plan, fine_days: list[int]) -> tuple[Any, Any]:
    """Return distinct times in ascending order and the rows of each; days not asked for count as their first second."""
    total = pa.table({"time": pa.array([], pa.int64()), "count": pa.array([], pa.int64()),
                      "group": pa.array([], pa.int64())})  # fmt: skip
    for bucket in range(plan.num_buckets):
        part = read_table(plan.work / f"filtered-{bucket:05d}.times.arrow")
        times = part.column("time").to_numpy()
        days = times // DAY
        groups = np.where(np.isin(days, fine_days), times, days * DAY)
        table = pa.concat_tables([total, part.append_column("group", pa.array(groups))])
        summed = table.group_by("group").aggregate([("time", "min"), ("count", "sum")])
        total = summed.rename_columns({"time_min": "time", "count_sum": "count"}).select(total.column_names)
    total = total.sort_by("time")
    return total.column("time").to_numpy(), total.column("count").to_numpy()


def _load_bucket(plan: Plan, bucket: int, columns: list[str]) -> Any:
    return read_table(plan.work / f"filtered-{bucket:05d}.arrow").select(columns)


def _load_ids(plan: Plan, bucket: int, kind: str) -> Any:
    return read_table(plan.work / f"filtered-{bucket:05d}.{kind}.arrow").column("id").combine_chunks()


def _draw_pool(plan: Plan, item_ids: list[str]) -> EventPool:
    """Return a sample of all events, chosen by the hash of their row, for negatives by popularity."""
    table = pa.table({name: pa.array([], kind) for name, kind in
                      (("timestamp", pa.int64()), ("row", pa.int64()), ("item_id", pa.string()))})  # fmt: skip
    if plan.dataset.feedback == "implicit" and plan.dataset.negative_sampling == "popularity":
        for bucket in range(plan.num_buckets):
            table = pa.concat_tables([table, _load_bucket(plan, bucket, table.column_names)])
            hashes = hash_integers(plan.seed, table.column("row").to_numpy())
            table = table.take(pa.array(np.argsort(hashes, kind="stable")[:POOL_SIZE]))
    table = table.sort_by([("timestamp", "ascending"), ("row", "ascending")])
    items = pc.index_in(table.column("item_id"), pa.array(item_ids, pa.string()))
    return EventPool(table.column("timestamp").to_numpy(), items.to_numpy().astype(np.int64))


def _describe(
    plan: Plan,
    user_ids: list[str],
    item_ids: list[str],
    texts_hash: str,
    split_rows: dict[str, Counter[str]],
    shards: list[dict[str, Any]],
    joined: list[dict[str, Any]],
    user_ranges: list[list[tuple[int, int]]],
) -> dict[str, Any]:
    filled = [shard for shard in shards if shard]
    splits = {}
    for name in SPLITS:
        own = [shard for shard in filled if shard["info"]["split"] == name]
        splits[name] = {
            **split_rows[name],
            "contexts": sum(shard["info"]["contexts"] for shard in own),
            "first_timestamp": min(shard["first"] for shard in own),
            "last_timestamp": max(shard["last"] for shard in own),
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_users": len(user_ids),
        "num_items": len(item_ids),
        "users_hash": compute_ids_hash(user_ids),
        "items_hash": compute_ids_hash(item_ids),
        "texts_hash": texts_hash,
        "ties": plan.preprocessing.ties,
        "feedback": plan.dataset.feedback,
        "max_history_length": plan.preprocessing.max_history_length,
        "splits": splits,
        "shards": [shard["info"] for shard in filled],
        "buckets": [
            {
                "path": f"interactions/bucket-{index:05d}.parquet",
                "rows": one["rows"],
                "sha256": one["sha256"],
                "user_ranges": [list(slice_) for slice_ in ranges],
            }
            for index, (one, ranges) in enumerate(zip(joined, user_ranges, strict=True))
        ],
    }
    return manifest | {"content_hash": compute_content_hash(manifest)}


def _describe_forgotten(
    plan: Plan, source: Source, reads: list[dict[str, Any]], asked: int, previous: PreviousTables
) -> dict[str, Any]:
    """Return what became of ``dataset.forget``, in numbers alone."""
    if plan.dataset.forget is None:
        return {}
    rows = Counter[str]()
    for chunk, read in zip(source.chunks, reads, strict=True):
        rows[chunk.uri] += read["forgotten"]
    forgotten = {
        "users_asked": asked,
        "users_in_log": len({user for read in reads for user in read["forgotten_users"]}),
        "rows_passed_over": {uri: count for uri, count in rows.items() if count},
        "users_in_extended_run": previous.num_forgotten,
        "tombstones": len(find_tombstones(plan.data_dir)),
    }
    return {"forgotten": forgotten}


def _print_summary(manifest: dict[str, Any], data_dir: Path) -> None:
    print(f"data: {manifest['num_users']:,} users, {manifest['num_items']:,} items")
    for name, split in manifest["splits"].items():
        print(f"  {name:5} {split['rows']:>12,} rows  {split['contexts']:>12,} contexts")
    for cause, count in manifest["dropped"].items():
        print(f"  left out: {count:,} rows, {cause}")
    if found := manifest.get("forgotten"):
        print(f"  to be forgotten: {found['users_asked']:,} users, {found['users_in_log']:,} of them in the log, "
              f"{found['users_in_extended_run']:,} in the run that is extended")  # fmt: skip
    print(f"  {data_dir / 'manifest.json'}")
